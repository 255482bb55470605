"""The timeline of a run with the real engines: lanes, nesting, times; a run that goes on adds to it."""

import io
import json
import time

import pytest
from rich.console import Console
from tiny import config_tree, read_lines

from gkd.config import parse_config
from launch.train import run_training

LANES = {
    "rollout: rollout 0": {"generate", "weight update", "load bucket", "finish update", "probe", "answer"},
    "teacher: teacher 0": {"score"},
    "trainer: loop": {"wait", "train", "evaluate", "checkpoint"},
    "trainer: weight sync": {"sync", "transfer", "probe", "proof"},
    "trainer: rank 0": {
        "step", "fetch signals", "micro-batch", "optimizer", "send weights", "score probe", "divergence", "save",
    },
}  # fmt: skip
"""Each lane, and what there is to see in it."""


def read_lanes(folder):
    """Intervals (begin, end, name, facts) of each lane in seconds, by their begin, outer ones first."""
    events = json.loads((folder / "trace.json").read_text(encoding="utf-8"))
    groups = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    lanes = {e["tid"]: f"{groups[e['pid']]}: {e['args']['name']}" for e in events if e["name"] == "thread_name"}
    found = {lane: [] for lane in lanes.values()}
    for event in events:
        if event["ph"] == "X":
            begin, end = event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6
            found[lanes[event["tid"]]].append((begin, end, event["name"], event["args"]))
    return {lane: sorted(intervals, key=lambda i: (i[0], -i[1])) for lane, intervals in found.items()}


def outermost(intervals):
    """Those that lie in no other; every other lies in one of them whole."""
    outer = []
    for interval in intervals:
        if outer and interval[0] < outer[-1][1]:
            assert interval[1] <= outer[-1][1], f"{interval} ends after {outer[-1]}"
        else:
            outer.append(interval)
    return outer


def seconds(intervals, name):
    return sum(end - begin for begin, end, own, _ in intervals if own == name)


def inside(intervals, name, outer):
    """Whether every interval of this name lies within one of the outer ones, but for how clocks differ."""
    own = [i for i in intervals if i[2] == name]
    return all(any(o[0] - 1e-3 <= i[0] and i[1] <= o[1] + 1e-3 for o in outer) for i in own)


@pytest.mark.slow
def test_every_worker_has_its_lane_and_a_resumed_run_goes_on(tmp_path, models, train_file, ray_cluster):
    def run(max_steps):
        tree = config_tree(tmp_path / "run", models("qwen2"), models("llama", seed=1), train_file)
        tree["run"]["resume"] = "auto"
        tree["data"]["eval"] = {"path": train_file}
        tree["eval"] = {"every_steps": 2, "limit": 8, "metrics": ["divergence"]}
        tree["trainer"] |= {"max_steps": max_steps, "tokens_per_micro_batch": 50}
        tree["log"] = {"trace": True}
        output, begin = io.StringIO(), time.time()
        run_training(parse_config(tree), Console(file=output, width=200))
        assert "bounded the steps, idle" in output.getvalue()
        return read_lanes(tmp_path / "run"), (begin, time.time())

    first, (begin, end) = run(2)
    assert {lane: {i[2] for i in intervals} for lane, intervals in first.items()} == LANES
    assert all(begin < i[0] <= i[1] < end for intervals in first.values() for i in intervals)
    both, (begin, end) = run(4)
    for lane, intervals in both.items():
        before, added = intervals[: len(first[lane])], intervals[len(first[lane]) :]
        assert before == first[lane] and {i[2] for i in added} == LANES[lane]
        assert all(begin < i[0] <= i[1] < end for i in added)

    tops = {lane: outermost(intervals) for lane, intervals in both.items()}
    loop, rank = both["trainer: loop"], both["trainer: rank 0"]
    assert tops["trainer: loop"] == loop and tops["teacher: teacher 0"] == both["teacher: teacher 0"]
    one_step = ["train", "wait"]
    of_a_run = ["wait", *one_step, *one_step, "evaluate", "checkpoint"]
    assert [i[2] for i in loop] == of_a_run * 2
    assert [i[3]["step"] for i in loop] == [0, 1, 1, 2, 2, 2, 2, 2, 3, 3, 4, 4, 4, 4]
    assert {i[2] for i in tops["trainer: weight sync"]} == {"sync"}
    assert [i[3]["version"] for i in tops["trainer: weight sync"]] == [0, 1, 2, 2, 3, 4]
    assert [i[3]["version"] for i in both["rollout: rollout 0"] if i[2] == "weight update"] == [0, 1, 2, 2, 3, 4]

    # What the ranks do lies in the loop's steps, across two processes; and so does a sync in the loop's waits.
    steps, waits = ([i for i in loop if i[2] == name] for name in ("train", "wait"))
    assert inside(rank, "step", steps) and inside(rank, "micro-batch", steps)
    assert inside(rank, "divergence", [i for i in loop if i[2] == "evaluate"])
    assert inside(both["trainer: weight sync"], "sync", waits)
    assert inside(both["rollout: rollout 0"], "weight update", tops["trainer: weight sync"])
    updates = [i for i in both["rollout: rollout 0"] if i[2] == "weight update"]
    assert inside(both["rollout: rollout 0"], "load bucket", updates)
    assert inside(both["rollout: rollout 0"], "finish update", updates)
    assert inside(both["rollout: rollout 0"], "generate", waits)  # nothing is stale here

    # The metrics are sums of the same intervals.
    for line in read_lines(tmp_path / "run" / "metrics.jsonl"):
        step = line["step"]
        [train] = [i for i in steps if i[3]["step"] == step]
        assert train[1] - train[0] == pytest.approx(line["time/train_s"], abs=1e-5)
        in_step = [i for i in rank if train[0] <= i[0] < train[1]]
        assert sum(i[2] == "micro-batch" for i in in_step) == line["train/micro_batches"] > 1
        assert 0 < seconds(in_step, "micro-batch") + seconds(in_step, "optimizer") < line["time/train_s"]
        # Version 2 came twice: at the end of the first run, and at the begin of the second.
        sync = next(i for i in tops["trainer: weight sync"] if i[3]["version"] == step)
        assert sync[1] - sync[0] == pytest.approx(line["sync/seconds"], abs=1e-5)
