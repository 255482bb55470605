"""What holds for which optimizer steps: a run's stages, one after the other. A run without stages is one stage."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Generic, TypeVar

from gkd.seeds import derive_seed

Value_co = TypeVar("Value_co", covariant=True)


@dataclass(frozen=True, slots=True)
class InStage(Generic[Value_co]):
    """Where in its stage a step is, and what holds there."""

    stage: int
    """The stage's place in the run, from 0."""
    step: int
    """The step within the stage, from 1."""
    value: Value_co
    """What holds in this stage."""


class ByStep(Generic[Value_co]):
    """Something that every stage has one of, found by the optimizer step: a pure function of the step."""

    def __init__(self, stages: Sequence[tuple[int, Value_co]]) -> None:
        """`stages` are the number of steps (1 or more) and the value of each stage, in their order."""
        assert stages and all(steps > 0 for steps, _ in stages), "a run has a stage, and a stage has a step"
        self._values = [value for _, value in stages]
        self._ends = list(accumulate(steps for steps, _ in stages))

    def at(self, step: int) -> InStage[Value_co]:
        """The stage of optimizer step `step`, from 1; steps beyond the last stage are counted on in it."""
        stage = next((i for i, end in enumerate(self._ends) if step <= end), len(self._ends) - 1)
        before = self._ends[stage - 1] if stage else 0
        return InStage(stage, step - before, self._values[stage])

    @property
    def values(self) -> list[Value_co]:
        """Of all stages, in their order."""
        return list(self._values)


def stage_seed(seed: int, stage: int) -> int:
    """The seed of what begins anew in a stage. The first one has the run's own, as a run without stages."""
    return seed if stage == 0 else derive_seed(seed, "stage", stage)
