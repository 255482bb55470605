"""How long what the workers read and write becomes, of the data of all stages and the held-out data."""

from collections.abc import Sequence
from typing import Protocol

from gkd.config import Config
from launch.architecture import Architecture
from launch.memory import Sizes
from launch.signal_choice import choose_signals


class Lengths(Protocol):
    """Of data, in tokens; `rollout.tokenized.TokenizedData` has them."""

    @property
    def longest_prompt(self) -> int:
        """Of the prompts."""

    @property
    def longest_scored_prompt(self) -> int:
        """Of the prompts that a teacher would read."""

    @property
    def longest_completion(self) -> int:
        """Of the dataset's own responses; 0 where none is used."""


def sizes_of(
    config: Config,
    *,
    student: Architecture,
    teachers: Sequence[Architecture],
    adapter: int,
    rows: int,
    stages: Sequence[Lengths],
    held_out: Lengths | None,
) -> Sizes:
    """What the memory of the workers is estimated from.

    Args:
        config: the run's.
        student: its architecture.
        teachers: those of all teachers; none where they have no workers of their own.
        adapter: parameters of the student's adapter; 0 without one.
        rows: V.
        stages: of each stage's data.
        held_out: of what evaluation uses; None where there is none.

    Raises:
        UserError: as `choose_signals`.
    """
    room = config.rollout.max_new_tokens
    parts = list(zip(stages, config.parts, strict=True))
    read = [*stages, *([held_out] if held_out else [])]
    response_room = room if config.needs_engine or config.generates else 0
    scored = [data for data, part in parts if part.needs_teacher]
    # Of held-out data a teacher scores answers alone, and those only for a divergence.
    compared = [held_out] if held_out and "divergence" in config.measured else []
    scored_room = room if compared or any(part.generates for part in config.parts if part.needs_teacher) else 0
    written = [data.longest_scored_prompt + room for data, part in parts if part.teacher_writes]
    return Sizes(
        student=student,
        teachers=tuple(teachers),
        adapter=adapter,
        rows=rows,
        signals=choose_signals(config, teachers, rows=rows),
        longest_prompt=max(data.longest_prompt for data in read),
        longest_response=max(response_room, *(data.longest_completion for data in read)),
        longest_scored_prompt=max((data.longest_scored_prompt for data in (*scored, *compared)), default=0),
        longest_scored_response=max((scored_room, *(data.longest_completion for data in scored))),
        longest_written=max(written, default=0),
    )
