import pytest

from launch.waits import idle_shares


def line(step, rollout, teacher, train, *, generated=8, teacher_s=1.0):
    return {
        "time/step_s": step, "time/rollout_wait_s": rollout, "time/teacher_wait_s": teacher, "time/train_wait_s": train,
        "tokens/generated": generated, "time/teacher_s": teacher_s, "tokens/trained": 8,
    }  # fmt: skip


def test_shares_are_of_medians():
    lines = [line(2.0, 0.5, 1.0, 0.8), line(2.0, 0.5, 1.0, 0.8), line(9.0, 8.0, 8.0, 0.1)]
    assert idle_shares(lines) == pytest.approx({"rollout": 0.25, "teacher": 0.5, "trainer": 0.4})


def test_who_is_not_there_does_not_wait():
    assert idle_shares([line(2.0, 0.0, 0.0, 0.5, generated=0, teacher_s=0.0)]) == {"trainer": 0.25}


def test_waits_longer_than_a_step_are_all_of_it():
    assert idle_shares([line(1.0, 3.0, 0.0, 0.0)])["rollout"] == 1.0
