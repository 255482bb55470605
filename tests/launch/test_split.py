"""The split that is suggested, against one found by trying everything."""

from itertools import product

import pytest
from plans import plan_config

from launch.planning.split import best_split
from launch.planning.step_time import step_seconds
from launch.planning.workload import Rates, Split, split_devices, stages_of, workload_of

EVERYTHING_FITS = lambda kind, split: True  # noqa: E731


def tried_out(config, work, rates, devices, under_way):
    """(seconds, devices) of the best of all splits."""
    several = len(config.all_teachers)
    found = []
    for engines, teachers, ranks in product(range(1, devices + 1), repeat=3):
        split = Split(engines=engines, teachers=teachers, ranks=ranks)
        if teachers % several or ranks > config.trainer.batch_size or split_devices(config, split) > devices:
            continue
        found.append((step_seconds(stages_of(config, work, split, rates), batches_under_way=under_way),
                      split_devices(config, split)))  # fmt: skip
    return min(found)


@pytest.mark.parametrize("devices", [3, 8, 13])
@pytest.mark.parametrize("max_staleness", [0, 1, 4])
@pytest.mark.parametrize(
    ("rates", "changes"),
    [
        ((10.0, 20.0, 30.0), {}),
        ((50.0, 7.0, 9.0), {"rollout": {"samples_per_prompt": 2}}),
        ((5.0, 50.0, 50.0), {"trainer": {"batch_size": 4}}),
        ((9.0, 9.0, 9.0), {"teacher": None, "teachers": [{"name": n, "model": "b", "weight": 1} for n in "ab"]}),
    ],
)
def test_none_is_better(devices, max_staleness, rates, changes):
    config = plan_config(sync={"max_staleness": max_staleness}, **changes)
    work = workload_of(config, prompt_tokens=5.0, response_tokens=10.0)
    rates = Rates(rollout=rates[0], teacher=rates[1], train=rates[2], sync_s=0.3)
    if config.mixture and devices == 3:
        assert best_split(config, work, rates, devices=devices, fits=EVERYTHING_FITS) is None
        return
    split = best_split(config, work, rates, devices=devices, fits=EVERYTHING_FITS)
    seconds = step_seconds(stages_of(config, work, split, rates), batches_under_way=max_staleness + 1)
    best = tried_out(config, work, rates, devices, max_staleness + 1)
    assert (seconds, split_devices(config, split)) == (pytest.approx(best[0]), best[1])


def test_tensor_parallel_engines_take_all_their_devices():
    config = plan_config(rollout={"tensor_parallel_size": 4})
    work = workload_of(config, prompt_tokens=5.0, response_tokens=10.0)
    rates = Rates(rollout=1.0, teacher=1000.0, train=1000.0, sync_s=0.0)
    assert best_split(config, work, rates, devices=13, fits=EVERYTHING_FITS).engines == 2
    assert best_split(config, work, rates, devices=5, fits=EVERYTHING_FITS) is None


def test_what_the_run_has_not_gets_no_device():
    config = plan_config(objective={"type": "sft"})
    work = workload_of(config, prompt_tokens=5.0, response_tokens=10.0)
    rates = Rates(rollout=None, teacher=None, train=1.0, sync_s=None)
    assert best_split(config, work, rates, devices=8, fits=EVERYTHING_FITS) == Split(engines=0, teachers=0, ranks=8)


def test_numbers_that_do_not_fit_are_left_out():
    config = plan_config()
    work = workload_of(config, prompt_tokens=5.0, response_tokens=10.0)
    rates = Rates(rollout=10.0, teacher=10.0, train=10.0, sync_s=0.0)

    def sharded_enough(kind, split):
        return kind != "ranks" or split.ranks >= 4

    assert best_split(config, work, rates, devices=8, fits=sharded_enough).ranks >= 4
    assert best_split(config, work, rates, devices=5, fits=sharded_enough) is None
