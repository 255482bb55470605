"""The length of a step by formula, against a clock that ticks through the pipeline."""

import pytest

from launch.planning.step_time import Stages, batches_under_way, bound_by, enough_under_way, step_seconds


def stages(rollout, teacher, train, sync):
    return Stages(rollout_s=rollout, teacher_s=teacher, train_s=train, sync_s=sync)


def ticked(rollout, teacher, train, sync, *, max_staleness, every_steps=1, steps=120):
    """Ticks a step on average: engines, teacher and trainer each do one batch after the other, in order. Batches are
    let go up to `max_staleness` beyond the version that is served; during a sync neither engines nor trainer work."""
    served, dispatched, written, scored, trained = 0, 1 + max_staleness, 0, 0, 0
    left = {"rollout": rollout, "teacher": teacher, "train": train, "sync": 0}
    clock, ends = 0, []
    while trained < steps:
        if left["sync"]:
            can_score = written > scored
            left["sync"] -= 1
            if not left["sync"]:
                served = trained
                dispatched = served + 1 + max_staleness
        else:
            can_write, can_score, can_train = dispatched > written, written > scored, scored > trained
            if can_write:
                left["rollout"] -= 1
                if not left["rollout"]:
                    left["rollout"], written = rollout, written + 1
            if can_train:
                left["train"] -= 1
                if not left["train"]:
                    left["train"], trained = train, trained + 1
                    ends.append(clock)
                    if trained % every_steps == 0:
                        left["sync"] = sync
        if can_score:
            left["teacher"] -= 1
            if not left["teacher"]:
                left["teacher"], scored = teacher, scored + 1
        clock += 1
    return (ends[-1] - ends[len(ends) // 2]) / (len(ends) - 1 - len(ends) // 2)


@pytest.mark.parametrize("max_staleness", [0, 1, 2, 5])
@pytest.mark.parametrize("seconds", [(60, 20, 30, 10), (20, 60, 30, 10), (20, 10, 60, 20), (30, 30, 30, 30)])
def test_the_formula_is_the_clock(seconds, max_staleness):
    under_way = batches_under_way(max_staleness=max_staleness, every_steps=1)
    assert step_seconds(stages(*seconds), batches_under_way=under_way) == pytest.approx(
        ticked(*seconds, max_staleness=max_staleness), rel=0.05
    )


@pytest.mark.parametrize("every_steps", [2, 3])
def test_with_fewer_syncs_the_formula_is_on_the_safe_side(every_steps):
    for max_staleness in (every_steps - 1, every_steps + 1):
        under_way = batches_under_way(max_staleness=max_staleness, every_steps=every_steps)
        found = step_seconds(stages(40, 20, 30, 12 / every_steps), batches_under_way=under_way)
        clock = ticked(40, 20, 30, 12, max_staleness=max_staleness, every_steps=every_steps)
        assert 0.95 * clock < found < 2 * clock


def test_hand_worked():
    own = stages(6.0, 2.0, 3.0, 1.0)
    assert own.round_trip_s == 12
    assert own.busy_s == {"rollout": 7, "teacher": 2, "trainer": 4}
    assert [step_seconds(own, batches_under_way=n) for n in (1, 2, 3)] == [12, 7, 7]
    assert [bound_by(own, batches_under_way=n) for n in (1, 2)] == ["round trip", "rollout"]
    assert enough_under_way(own) == 2
    assert enough_under_way(stages(0, 0, 3.0, 0)) == 1
    assert bound_by(stages(0, 0, 3.0, 0), batches_under_way=1) == "trainer"
    # Without engines there is nobody that a sync would keep from writing.
    assert stages(0, 1.0, 1.0, 0.5).busy_s["rollout"] == 0
