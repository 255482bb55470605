"""`make bench`: what it keeps of its parts, and the syncs that it takes from the timelines of runs."""

import pytest

from benchmarks import sync_runs
from gkd.config import parse_config


@pytest.mark.parametrize("way", sync_runs.WAYS)
def test_the_config_of_every_way_of_syncing_is_one(way, tmp_path):
    config = parse_config(sync_runs.config_tree(way, tmp_path))
    assert config.log.trace and config.sync.max_staleness == 0
    assert (config.student.lora is not None) == ("LoRA" in way)
    assert config.trainer.num_ranks == (2 if "2 ranks" in way else 1)


def lane(number, name):
    """The event that names a lane."""
    return {"name": "thread_name", "ph": "M", "tid": number, "args": {"name": name}}


def interval(number, name, begin_s, seconds):
    """An event of a lane."""
    return {"name": name, "ph": "X", "tid": number, "ts": int(begin_s * 1e6), "dur": int(seconds * 1e6), "args": {}}


def test_the_parts_of_a_sync_are_each_taken_from_one_lane():
    """The engine and the driver both call something a probe, and every rank gathers: one of them each is counted."""
    driver, rank_0, rank_1, engine = 4001, 4010, 4011, 1000
    events = [
        lane(driver, "weight sync"), lane(rank_0, "rank 0"), lane(rank_1, "rank 1"), lane(engine, "rollout 0"),
        interval(driver, "sync", 10, 3), interval(driver, "transfer", 10, 2), interval(driver, "probe", 12, 0.5),
        interval(driver, "proof", 12.5, 0.25), interval(engine, "load bucket", 10.5, 0.5),
        interval(engine, "load bucket", 11, 0.25), interval(engine, "finish update", 11.5, 0.125),
        interval(engine, "probe", 12, 0.4), interval(rank_0, "gather", 10, 0.5), interval(rank_1, "gather", 10, 0.5),
        interval(driver, "sync", 20, 1), interval(rank_0, "gather", 22, 7), interval(engine, "load bucket", 20, 1),
    ]  # fmt: skip
    first, second = sync_runs.sync_parts(events)
    assert first == {
        "sync_s": 3, "transfer_s": 2, "gather_s": 0.5, "load_s": 0.875, "probe_s": 0.5, "proof_s": 0.25,
    }  # fmt: skip
    assert second == {"sync_s": 1, "transfer_s": 0, "gather_s": 0, "load_s": 1, "probe_s": 0, "proof_s": 0}
    head, _, row = sync_runs.table([{"way": "all weights", "bytes": 2e6} | first])
    assert row == "| all weights | 2.0 | 3.000 | 2.000 | 0.500 | 0.875 | 0.500 | 0.250 |"
    assert head.count("|") == row.count("|")
