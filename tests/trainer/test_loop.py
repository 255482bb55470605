"""The loop with fakes that record what happens when."""

import itertools
import threading
import time

import pytest

from gkd.errors import Interrupted
from gkd.interfaces import ScoredBatch
from gkd.trace import Lane
from trainer import checkpoint
from trainer.best import Best
from trainer.loop import Parts, Span, train
from trainer.records import Records
from trainer.step import StepReport
from trainer.weight_sync import SyncReport


class World:
    """A learner, a pipeline and a sync in one; events in the order in which they happened."""

    def __init__(self, *, push_s=0.0, max_staleness=0, fails_at=None, stop_after=None):
        self.events = []
        self.push_s = push_s
        self.max_staleness = max_staleness
        self.fails_at = fails_at
        self.stop_after = stop_after
        self.window = threading.Condition()
        self.released = -1
        self.error = None
        self.next_step = 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.events.append("closed")

    def release(self, version):
        with self.window:
            self.released = version
            self.window.notify()

    def fail(self, error):
        with self.window:
            self.error = error
            self.window.notify()

    def take(self):
        if self.stop_after is not None and f"train {self.stop_after}" in self.events:
            return None
        step = self.next_step
        self.next_step += 1
        with self.window:
            assert self.window.wait_for(lambda: self.error or self.released >= step - 1 - self.max_staleness, timeout=5)
        if self.error:
            raise self.error
        self.events.append(f"take {step}")
        empty = {"rollouts": (), "groups": (), "signals": (), "signal_bytes": 0}
        times = dict.fromkeys(("rollout_s", "teacher_s", "rollout_wait_s", "teacher_wait_s"), 0.0)
        return ScoredBatch(step=step, **empty, **times)

    def step(self, number, *_):
        self.events.append(f"train {number}")
        return StepReport(loss=1.0, metrics={}, grad_norm=0.0, learning_rate=0.1, num_tokens=1, num_micro_batches=1)

    def push(self, version, served):
        if version == self.fails_at:
            raise OSError("the engine is gone")
        time.sleep(self.push_s)
        self.events.append(f"served {version}")
        served(version)
        time.sleep(self.push_s)
        self.events.append(f"proven {version}")
        return SyncReport(version=version, seconds=0.0, num_bytes=0, logprob_gap_max=0.0)

    def save(self, folder):
        self.events.append("save")
        (folder / "weights").write_text("x")


def run(world, folder, *, steps=3, completed=0, evaluate=lambda step: {}, lane=None, **span):
    folder.mkdir(exist_ok=True)
    shown = []
    parts = Parts(
        pipeline=world,
        learner=world,
        sync=world,
        evaluate=evaluate,
        records=Records(folder, str, rollouts_every=0, rollouts_kept=1, completed_steps=completed),
        report=shown.append,
        lane=lane or Lane(),
    )
    settings = {"checkpoint_every": 0, "keep_last": 2, "best": Best(None)} | span
    train(
        parts,
        Span(completed_steps=completed, max_steps=steps, checkpoints=folder / "checkpoints", state={}, **settings),
    )
    return shown


@pytest.fixture(autouse=True)
def batches_without_rollouts(monkeypatch):
    monkeypatch.setattr("trainer.loop.step_metrics", lambda batch, *_, **times: {"step": batch.step} | times)


def test_strictly_on_policy_everything_waits_for_the_proof(tmp_path):
    world = World(push_s=0.01)
    run(world, tmp_path / "run")
    assert world.events == [
        "served 0", "proven 0", "take 1", "train 1",
        "served 1", "take 2", "proven 1", "train 2",
        "served 2", "take 3", "proven 2", "train 3",
        "served 3", "proven 3", "save", "closed",
    ]  # fmt: skip


def test_in_streaming_the_next_batch_does_not_wait_for_the_push(tmp_path):
    world = World(push_s=0.05, max_staleness=1)
    run(world, tmp_path / "run")
    assert world.events.index("take 2") < world.events.index("served 1")
    for step in (1, 2):  # but the weights do wait for their proof
        assert world.events.index(f"proven {step}") < world.events.index(f"train {step + 1}")


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_a_push_that_fails_ends_the_run_with_its_error(tmp_path, max_staleness):
    with pytest.raises(OSError, match="the engine is gone"):
        run(World(fails_at=2, max_staleness=max_staleness), tmp_path / "run")


def test_a_stop_saves_and_generates_nothing_more(tmp_path):
    world, evaluated = World(stop_after=2), []
    with pytest.raises(Interrupted, match="after step 2"):
        run(world, tmp_path / "run", steps=9, evaluate=lambda step: evaluated.append(step) or {})
    assert "take 3" not in world.events and world.events[-2:] == ["save", "closed"]
    assert evaluated == [1]
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").step == 2


def test_a_finished_run_does_nothing(tmp_path):
    world = World()
    run(world, tmp_path / "run", steps=3, completed=3)
    assert world.events == []


def test_the_best_step_is_saved_when_it_is_found(tmp_path):
    values = {1: 0.9, 2: 0.4, 3: 0.6, 4: 0.5, 5: 0.7}
    shown = run(
        World(),
        tmp_path / "run",
        steps=5,
        evaluate=lambda step: {"eval/divergence": values[step]},
        best=Best("divergence"),
        keep_last=1,
    )
    assert [line["eval/divergence"] for line in shown] == list(values.values())
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step_2", "step_5"]
    assert checkpoint.newest(folder).state["best"] == {"metric": "divergence", "step": 2, "value": 0.4}


def test_the_loop_measures_and_records_what_it_does(tmp_path):
    lane = Lane()
    lane.start()
    shown = run(World(push_s=0.02), tmp_path / "run", steps=2, lane=lane)
    intervals = lane.take()
    assert [(i.name, i.facts["step"]) for i in intervals] == [
        ("wait", 0), ("train", 1), ("wait", 1), ("train", 2), ("wait", 2), ("checkpoint", 2),
    ]  # fmt: skip
    assert all(before.end_ns <= after.start_ns for before, after in itertools.pairwise(intervals))
    for step, line in enumerate(shown, 1):
        seconds = [(i.end_ns - i.start_ns) / 1e9 for i in intervals[2 * step - 1 : 2 * step + 1]]
        assert [line["train_s"], line["wait_s"]] == pytest.approx(seconds, abs=1e-6)
        assert line["wait_s"] >= 0.04  # the push is waited for
