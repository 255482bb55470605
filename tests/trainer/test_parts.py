"""Checkpoint files, records, schedules and the weight sync, each on its own."""

import itertools
import json
import math

import pytest

from gkd.trace import Lane
from gkd.types import Rollout, SampleId
from trainer import checkpoint
from trainer.best import Best
from trainer.records import Records
from trainer.schedule import learning_rate
from trainer.weight_sync import AwaitedSync, BackgroundPush, NoSync, WeightGapError, WeightSync, stop_the_run


def save(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "weights.bin").write_bytes(b"12345")


def test_checkpoints_are_whole_or_not_there(tmp_path):
    for step in (2, 4, 6):
        checkpoint.write(tmp_path, step, {"seed": step}, save, keep_last=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_4", "step_6"]
    newest = checkpoint.newest(tmp_path)
    assert (newest.step, newest.state) == (6, {"seed": 6})
    # Damage of any kind makes the one before it the newest good one.
    (tmp_path / "step_6" / "sub" / "weights.bin").write_bytes(b"123")
    assert checkpoint.newest(tmp_path).step == 4
    (tmp_path / "step_4" / "run_state.json").write_text("{")
    assert checkpoint.newest(tmp_path) is None


def test_a_save_that_dies_leaves_the_older_checkpoint(tmp_path):
    checkpoint.write(tmp_path, 2, {}, save, keep_last=1)

    def dies(folder):
        save(folder)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.write(tmp_path, 4, {}, dies, keep_last=1)
    assert checkpoint.newest(tmp_path).step == 2
    checkpoint.write(tmp_path, 4, {}, save, keep_last=1)  # what it left behind is no obstacle
    assert [p.name for p in tmp_path.iterdir()] == ["step_4"]


def test_later_checkpoints_go_when_a_run_goes_on_from_an_earlier_one(tmp_path):
    for step in (2, 4, 6):
        checkpoint.write(tmp_path, step, {}, save, keep_last=9)
    checkpoint.drop_after(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step_2"]


def rollout(index, length=3):
    return Rollout(
        id=SampleId(0, index, 0),
        prompt_ids=(2, 3),
        response_ids=(4,) * length,
        stop_reason="length",
        source="student",
        versions=(1, 2),
    )


def records(folder, completed_steps):
    return Records(folder, str, rollouts_every=2, rollouts_kept=1, completed_steps=completed_steps)


def test_records_are_cut_back_to_the_checkpoint(tmp_path):
    with records(tmp_path, 0) as first:
        for step in (1, 2, 3):
            first.write(step, {"step": step}, [rollout(2 * step), rollout(2 * step + 1)], None)
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"step": 4, "epo')  # the process died here
    with records(tmp_path, 2) as second:
        second.write(3, {"step": 3}, [rollout(9)], None)
    ledger = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["prompt_index"]) for line in ledger] == [(1, 2), (1, 3), (2, 4), (2, 5), (3, 9)]
    assert ledger[0] | {"step": 0} == {
        "step": 0,
        "epoch": 0,
        "prompt_index": 2,
        "sample_index": 0,
        "source": "student",
        "versions": [1, 2],
        "tokens": 3,
        "stop_reason": "length",
    }
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
    assert sorted(p.name for p in (tmp_path / "rollouts").iterdir()) == ["step_1.txt", "step_2.txt"]


def test_schedules():
    def rates(schedule, warmup_steps):
        return [
            learning_rate(s, peak=1.0, schedule=schedule, warmup_steps=warmup_steps, max_steps=10) for s in range(1, 11)
        ]

    assert rates("constant", 0) == [1.0] * 10
    assert rates("constant", 4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates("linear", 0) == pytest.approx([1 - i / 10 for i in range(10)])
    cosine = rates("cosine", 2)
    assert cosine[2] == 1.0 and cosine[6] == pytest.approx(0.5) and 0 < cosine[-1] < 0.1
    assert all(a >= b for a, b in itertools.pairwise(cosine[2:]))


class FakeTrainer:
    def __init__(self, logprobs):
        self.answer = logprobs

    def publish(self):
        yield "bucket"

    def sent_bytes(self):
        return 12

    def logprobs(self, rollouts):
        return self.answer


class FakeEngines:
    def __init__(self):
        self.received = []

    def update_weights(self, version, messages):
        assert list(messages) == ["bucket"]
        self.received.append(version)

    def probe(self):
        probe = rollout(0, length=2)
        return [Rollout(**{f: getattr(probe, f) for f in probe.__slots__} | {"logprobs": (-1.0, -2.0)})]


def sync(logprobs, engines, *, max_gap=1e-3, due=lambda step: True, on_gap=stop_the_run):
    return WeightSync(FakeTrainer(logprobs), engines, Lane(), due=due, max_gap=max_gap, on_gap=on_gap)


def test_the_sync_measures_the_gap_and_stops_a_wrong_engine():
    engines, served = FakeEngines(), []
    report = sync([[-1.0, -2.0005]], engines).push(4, served.append)
    assert report.logprob_gap_max == pytest.approx(5e-4)
    assert (report.version, report.num_bytes, engines.received, served) == (4, 12, [4], [4])
    for wrong in (-2.5, math.nan):
        with pytest.raises(WeightGapError, match="version 5"):
            sync([[-1.0, wrong]], engines).push(5, served.append)
    assert sync([[-1.0, -2.5]], engines, max_gap=None).push(5, served.append).logprob_gap_max == 0.5
    warnings = []
    assert sync([[-1.0, -2.5]], engines, on_gap=warnings.append).push(5, served.append).logprob_gap_max == 0.5
    assert len(warnings) == 1 and "0.5 nats" in warnings[0]


def test_a_sync_that_is_not_due_leaves_the_engines_and_the_window_alone():
    engines, served = FakeEngines(), []
    every_other = sync([[-1.0, -2.0]], engines, due=lambda step: step % 2 == 0)
    reports = [every_other.push(version, served.append) for version in (3, 4, 5, 6)]  # the first is always due
    assert engines.received == served == [3, 4, 6]
    assert [report.version for report in reports] == [3, 4, 4, 6]
    assert reports[2].logprob_gap_max is None and reports[2].num_bytes == 0


def test_engines_that_only_evaluate_hold_nothing_up():
    engines, served = FakeEngines(), []
    evaluated = AwaitedSync(sync([[-1.0, -2.0]], engines, due=lambda step: step % 2 == 0), lambda version: False)
    assert [evaluated.push(version, served.append).version for version in range(5)] == list(range(5))
    assert served == list(range(5)) and engines.received == [0, 2, 4]


def test_a_push_that_fails_in_the_background_tells_whoever_waits():
    failed = []

    class Broken:
        def push(self, version, served):
            raise OSError("no connection")

    with (
        pytest.raises(OSError, match="no connection"),
        BackgroundPush(Broken(), 1, served=failed.append, failed=failed.append) as push,
    ):
        push._thread.join()
    assert [type(error) for error in failed] == [OSError]


def test_without_an_engine_the_gap_is_null():
    served = []
    report = NoSync().push(3, served.append)
    assert (report.version, report.logprob_gap_max, report.num_bytes, served) == (3, None, 0, [3])


def test_the_best_checkpoint_stays(tmp_path):
    best = Best("divergence")
    values = {2: 0.5, 4: 0.2, 6: 0.3, 8: 0.2, 10: 0.25}
    for step, value in values.items():
        assert best.update(step, {"eval/divergence": value}) == (step in (2, 4))  # a tie is no improvement
        checkpoint.write(tmp_path, step, {}, save, keep_last=2, keep_step=best.step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_10", "step_4", "step_8"]
    assert not best.update(11, {"loss/total": 0.1})  # a step that was not evaluated
    resumed = Best.resumed("divergence", best.state())
    assert not resumed.update(12, {"eval/divergence": 0.21}) and resumed.update(14, {"eval/divergence": 0.1})
    assert Best.resumed("exact_match", best.state()).step is None  # another metric starts anew
    broken = Best("divergence", step=2, value=0.5)
    assert not broken.update(3, {"eval/divergence": math.nan}) and broken.step == 2
    assert not Best("divergence").update(1, {"eval/divergence": math.inf})
    rising = Best("exact_match")
    assert rising.update(1, {"eval/exact_match": 0.1}) and not rising.update(2, {"eval/exact_match": 0.05})
    assert rising.update(3, {"eval/exact_match": 0.2}) and not Best(None).update(1, {"eval/exact_match": 1.0})
