"""The benchmark of one rank's step: every way learns the same, through DeepSpeed, and the table says what was held."""

import json

import pytest

from benchmarks import train_step
from benchmarks.speed import cases

TINY = {"pair": cases.TINY, "batch": 3, "prompt_tokens": 4, "new_tokens": 6, "teacher_dtype": "float32"}


def found():
    """As `measure` finds it; seconds and bytes are made up."""
    seconds = [0.4, 0.5, 0.7]
    row = {"step_s": 0.5, "step_seconds": seconds, "losses": [2.0, 1.5], "held_bytes": 2e9, "planned_bytes": 1.5e9}
    return {"tokens": 1000, "ways": [{"way": "float32"} | row, {"way": "bfloat16"} | row]}


def test_the_table_and_the_plot_have_every_way(tmp_path):
    _, _, first, second = train_step.table(json.loads(json.dumps(found())))
    assert first == "| float32 | 0.500 | 0.400, 0.700 | 2,000 | 2.00 | 1.50 | 0.75 |"
    assert second == first.replace("float32", "bfloat16")
    train_step.plot(found(), tmp_path / "train_step.png")
    assert (tmp_path / "train_step.png").stat().st_size > 0


def test_ways_that_learn_different_things_are_no_comparison():
    first, other = found()["ways"]
    train_step._check(first, other | {"losses": [2.01, 1.51]})
    with pytest.raises(ValueError, match="float32 and float32, ZeRO 2 learn different things"):
        train_step._check(first, other | {"way": "float32, ZeRO 2", "losses": [2.01, 1.51]})


@pytest.mark.parametrize("device", train_step.SIZES)
def test_every_way_has_a_config_of_its_own(device):
    trainers = [train_step.config_of(way, device).trainer for way in train_step.WAYS]
    assert len({trainer.model_dump_json() for trainer in trainers}) == len(train_step.WAYS)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_step_learns_and_is_measured(device, monkeypatch, tmp_path):
    monkeypatch.setattr(train_step, "FOLDER", tmp_path)
    monkeypatch.setitem(train_step.SIZES, device, TINY)
    train_step.write_shapes(device)
    row = train_step.measure_way("float32", device)
    assert len(row["step_seconds"]) == 3 and row["step_s"] == sorted(row["step_seconds"])[1]
    assert row["losses"][-1] < row["losses"][0]
    assert row["held_bytes"] > 0 and row["planned_bytes"] > 0
