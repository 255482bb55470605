import pytest

from launch.bottleneck import Waits, bottleneck


def line(*, train=0.2, wait=0.8, rollout_wait=0.4, teacher_wait=0.7, sync=0.1, works=True, **others):
    """A step of one second, as `trainer/metrics.py` has it."""
    return {
        "time/train_s": train,
        "time/train_wait_s": wait,
        "time/step_s": train + wait,
        "time/rollout_s": 0.5 * works,
        "time/teacher_s": 0.1 * works,
        "time/rollout_wait_s": rollout_wait if works else 0.0,
        "time/teacher_wait_s": teacher_wait if works else 0.0,
        "sync/seconds": sync,
    } | others


def test_the_stage_that_rests_least_bounds_the_steps():
    found = bottleneck([line()] * 4)
    assert found.stage == "rollout"
    assert found.idle == pytest.approx({"rollout": 0.4, "teacher": 0.7, "trainer": 0.8, "sync": 0.9})
    assert str(found) == (
        "the rollout engines bounded the steps, idle 40% of the time (idle: teachers 70%, trainer 80%, weight sync 90%)"
    )


@pytest.mark.parametrize(
    ("changes", "stage"),
    [
        ({"teacher_wait": 0.0}, "teacher"),
        ({"train": 0.9, "wait": 0.1}, "trainer"),
        ({"sync": 0.7}, "sync"),
        ({"time/eval_s": 3.0, "rollout_wait": 3.4, "teacher_wait": 3.7}, "eval"),
        ({"time/reward_wait_s": 0.1}, "reward"),
    ],
)
def test_each_stage_can_be_it(changes, stage):
    assert bottleneck([line(**changes)] * 3).stage == stage


def test_the_waits_before_a_batch_belong_to_the_step_before():
    """The first line's waits are the start's, and the last step's time has no waits yet."""
    lines = [line(rollout_wait=99.0, wait=1.8), line(rollout_wait=0.5), line(rollout_wait=0.25, train=50.0)]
    assert bottleneck(lines).idle["rollout"] == pytest.approx((0.5 + 0.25) / (2.0 + 1.0))
    assert bottleneck(lines).idle["trainer"] == pytest.approx(1 - 0.4 / 3.0)


def test_who_is_not_asked_in_a_stage_of_the_run_does_not_bound_it():
    text = line(works=False, train=0.9, wait=0.1, sync=0.0)
    assert bottleneck([text] * 3).idle == pytest.approx({"trainer": 0.1})
    assert str(bottleneck([text] * 3)) == "the trainer bounded the steps, idle 10% of the time"
    found = bottleneck([text, text, line(), line()])  # three pairs, two of which lead to a step with engines
    assert found.idle["rollout"] == pytest.approx(1 - 1.2 / 3)


def test_waits_of_more_time_than_the_steps_are_all_the_time():
    assert bottleneck([line(teacher_wait=1.5)] * 3).idle["teacher"] == 1.0


def test_a_step_alone_says_nothing():
    assert bottleneck([]) is None and bottleneck([line()]) is None
    waits = Waits()
    waits.add(line())
    waits.add(line())
    assert waits.bottleneck() == bottleneck([line()] * 2)
