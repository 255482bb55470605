"""How long an optimizer step takes, from how long it keeps each kind of worker busy.

A step's batch goes round: its prompts are let go when the engines serve a version, it is written, scored and trained
on, and the new version is served. With `sync.max_staleness` = k as many as k + 1 batches are under way, so a step takes
at least the round trip over k + 1; and it takes at least as long as it keeps any one worker busy. The larger of the two
is the step. At k = 0 that is the sum of all stages, with a large k the largest. A sync keeps the trainer waiting, and
the engines from writing.

How much of a batch is scored while the rest of it is still being written depends on how lengths vary; it is taken to
be nothing, unless a strictly on-policy run has shown it.
"""

from dataclasses import dataclass
from math import ceil
from typing import Literal

Bound = Literal["rollout", "teacher", "trainer", "round trip"]
"""What a step waits for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """Seconds that a step takes of each kind of worker."""

    rollout_s: float
    """Of the engines, to write its responses."""
    teacher_s: float
    """Of the teachers, to score them."""
    train_s: float
    """Of the trainer's ranks."""
    sync_s: float
    """Of trainer and engines, to bring the engines to the new version; over the steps between two syncs."""
    scored_meanwhile: float = 0.0
    """Share of the scoring that is done while others of the batch are still being written."""

    @property
    def round_trip_s(self) -> float:
        """Of a batch that nothing else is in the way of."""
        return self.rollout_s + (1 - self.scored_meanwhile) * self.teacher_s + self.train_s + self.sync_s

    @property
    def busy_s(self) -> dict[Bound, float]:
        """Seconds that a step keeps each kind of worker from anything else."""
        return {
            "rollout": self.rollout_s + (self.sync_s if self.rollout_s else 0.0),
            "teacher": self.teacher_s,
            "trainer": self.train_s + self.sync_s,
        }


def step_seconds(stages: Stages, *, batches_under_way: int) -> float:
    """How long a step takes.

    Args:
        stages: of the step.
        batches_under_way: as of `batches_under_way`.
    """
    return max(stages.round_trip_s / batches_under_way, *stages.busy_s.values())


def bound_by(stages: Stages, *, batches_under_way: int) -> Bound:
    """What a step waits for: the worker that it keeps busy longest, or with too few batches under way all in turn."""
    busiest = max(stages.busy_s, key=lambda worker: stages.busy_s[worker])
    return "round trip" if batches_under_way < enough_under_way(stages) else busiest


def batches_under_way(*, max_staleness: int, every_steps: int) -> int:
    """Batches between the release of their prompts and the version that they make, when most are.

    The window is 1 + `max_staleness`, and closes by up to `every_steps` - 1 until the next sync.
    """
    return 2 + max_staleness - every_steps


def enough_under_way(stages: Stages) -> int:
    """The fewest batches under way with which the busiest worker is never idle."""
    return max(1, ceil(stages.round_trip_s / max(stages.busy_s.values()) - 1e-9))
