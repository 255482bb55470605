"""What the stages of a run have in common, and what is found out about each."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from gkd.config import Config
from gkd.config.stages import in_stage
from gkd.errors import UserError
from gkd.stages import ByStep

Found = TypeVar("Found")


def in_each_stage(config: Config, find: Callable[..., Found], *known: Sequence[Any]) -> list[Found]:
    """What is found out about each stage, in their order; of a run without stages about the run.

    Args:
        config: the run's.
        find: called with a stage's config, and what is known of the stage.
        known: of each stage.

    Raises:
        UserError: naming the stage, if `find` raises one.
    """
    found = []
    for number, (part, *own) in enumerate(zip(config.parts, *known, strict=True)):
        with naming(config, number):
            found.append(find(part, *own))
    return found


@contextmanager
def naming(config: Config, number: int) -> Iterator[None]:
    """Errors of the user's from within name the stage `number`; in a run without stages they stay as they are."""
    try:
        yield
    except UserError as error:
        if not config.stages:
            raise
        raise in_stage(error, number, config.stages[number]) from error.__cause__


def notes_of_each(config: Config, find: Callable[..., Sequence[str]], *known: Sequence[Any]) -> list[str]:
    """What is worth knowing of each stage; once, where it is the same in all. Arguments as of `in_each_stage`."""
    found = in_each_stage(config, find, *known)
    if all(notes == found[0] for notes in found):
        return list(found[0])
    return [f"stages.{number}: {note}" for number, notes in enumerate(found) for note in notes]


def by_step(config: Config, values: Sequence[Found]) -> ByStep[Found]:
    """One value for each stage, found by the optimizer step."""
    return ByStep([(part.trainer.max_steps, value) for part, value in zip(config.parts, values, strict=True)])


def stage_names(config: Config) -> list[str]:
    """What the stages are called; none in a run without stages."""
    return [stage.name or part.objective.type for stage, part in zip(config.stages, config.parts, strict=False)]


def compared_stage(config: Config) -> Config:
    """The stage whose loss evaluation measures, from the first step to the last: the last one that has a teacher."""
    return next((part for part in reversed(config.parts) if part.needs_teacher), config.parts[-1])
