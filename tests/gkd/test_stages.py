import pickle

import pytest

from gkd.stages import ByStep, stage_seed


def test_every_step_is_in_the_stage_that_a_count_gives():
    lengths = [("a", 3), ("b", 1), ("c", 5)]
    stages = ByStep([(steps, name) for name, steps in lengths])
    expected = [(place, step, name) for place, (name, steps) in enumerate(lengths) for step in range(1, steps + 1)]
    found = [stages.at(step) for step in range(1, 10)]
    assert [(at.stage, at.step, at.value) for at in found] == expected
    beyond = stages.at(11)  # a run may be asked for what comes after its last step
    assert (beyond.stage, beyond.step, beyond.value) == (2, 7, "c")
    assert stages.values == ["a", "b", "c"]
    assert pickle.loads(pickle.dumps(stages)).at(4).value == "b"


@pytest.mark.parametrize("stages", [[], [(0, "a")], [(2, "a"), (0, "b")]])
def test_a_run_has_a_stage_and_a_stage_has_a_step(stages):
    with pytest.raises(AssertionError):
        ByStep(stages)


def test_what_begins_with_a_stage_has_a_seed_of_its_own():
    assert stage_seed(7, 0) == 7  # as in a run without stages
    assert len({stage_seed(seed, stage) for seed in (7, 8) for stage in range(4)}) == 8
