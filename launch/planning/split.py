"""Which split of some devices over engines, teachers and training ranks makes the shortest step: all are tried."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from gkd.config import Config
from launch.planning.step_time import batches_under_way, step_seconds
from launch.planning.workload import (
    Rates,
    Split,
    Workload,
    engine_devices,
    other_devices,
    split_of,
    stages_of,
    teacher_devices,
)

Kind = Literal["engines", "teachers", "ranks"]
"""A field of `Split`."""
Fits = Callable[[Kind, Split], bool]
"""Whether the workers of one kind have the memory that they need, if there are so many as the split says."""
_SECONDS: dict[Kind, str] = {"engines": "rollout_s", "teachers": "teacher_s", "ranks": "train_s"}
"""Kind -> the field of `Stages` that says how long a step takes of it."""


@dataclass(frozen=True, slots=True)
class _Count:
    """So many workers of one kind."""

    number: int
    devices: int
    seconds: float
    """That a step takes of them."""


def best_split(config: Config, work: Workload, rates: Rates, *, devices: int, fits: Fits) -> Split | None:
    """The split with the shortest step; of several the one with the fewest devices. None where none fits.

    Args:
        config: of the stage; it says which kinds of worker there are, and how many devices each takes.
        work: of its steps.
        rates: of the workers.
        devices: how many there are.
        fits: asked of each number of a kind that would be of use.
    """
    own, free = split_of(config), devices - other_devices(config)

    def counts(kind: Kind, *, each: int, most: int, step: int = 1) -> Sequence[_Count]:
        """The numbers of a kind that are worth trying, fewest first: those that make its stage faster than all smaller
        ones do. Any other could give a worker away and lose nothing."""
        if getattr(own, kind) == 0:
            return [_Count(0, 0, 0.0)]
        found: list[_Count] = []
        for number in range(step, min(most, free // each) + 1, step):
            split = replace(own, **{kind: number})
            seconds = getattr(stages_of(config, work, split, rates), _SECONDS[kind])
            if (not found or seconds < found[-1].seconds) and fits(kind, split):
                found.append(_Count(number, number * each, seconds))
        return found

    candidates = product(
        counts("engines", each=engine_devices(config), most=free),
        # Of several teachers there are equally many.
        counts("teachers", each=teacher_devices(config), most=free, step=len(config.all_teachers) or 1),
        # A rank without a sequence of its own would only stand by, and the config's checks refuse it.
        counts("ranks", each=1, most=work.sequences),
    )
    under_way = batches_under_way(max_staleness=config.sync.max_staleness, every_steps=config.sync.every_steps)
    configured = stages_of(config, work, own, rates)
    best: tuple[float, int, Split] | None = None
    for engine, teacher, rank in candidates:
        used = engine.devices + teacher.devices + rank.devices
        if used > free:
            continue
        stages = replace(configured, rollout_s=engine.seconds, teacher_s=teacher.seconds, train_s=rank.seconds)
        found = (step_seconds(stages, batches_under_way=under_way), used)
        if best is None or found < best[:2]:
            best = (*found, Split(engines=engine.number, teachers=teacher.number, ranks=rank.number))
    return None if best is None else best[2]
