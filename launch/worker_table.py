"""A run's workers as a table: where each goes, and how much memory it needs."""

from collections.abc import Sequence
from itertools import groupby

from rich.table import Table

from launch.memory import GIB, Need
from launch.placement import Place

_SHOWN = 0.05 * GIB
"""Smaller parts are summed up."""


def worker_table(places: Sequence[Place], needs: Sequence[Need]) -> Table:
    """The table.

    Args:
        places: of the workers, those of one kind side by side.
        needs: the memory of each kind, where it is known.
    """
    known = {need.worker: need for need in needs}
    num_gpus = sum(place.num_gpus for place in places)
    table = Table(
        "worker",
        "each takes",
        "GiB per GPU" if num_gpus else "GiB each",
        "of which",
        title="workers (memory is an estimate)",
        caption=f"{num_gpus:g} GPUs in all" if num_gpus else None,
    )
    for worker, group in groupby(places, key=lambda place: place.worker):
        members = list(group)
        name = worker if len(members) == 1 else f"{len(members)} x {worker}"
        table.add_row(name, _share(members[0]), *_memory(known.pop(worker, None)))
    for need in known.values():
        table.add_row(need.worker, "host memory", *_memory(need))
    return table


def _share(place: Place) -> str:
    if not place.num_gpus:
        return f"{place.num_cpus:g} CPU"
    return "1 GPU" if place.num_gpus == 1 else f"{place.num_gpus:g} GPUs"


def _memory(need: Need | None) -> tuple[str, str]:
    if need is None:
        return "?", "not known without the model"
    large = sorted((item for item in need.parts.items() if item[1] >= _SHOWN), key=lambda item: -item[1])
    rest = need.num_bytes - sum(size for _, size in large)
    shown = [f"{name} {size / GIB:.1f}" for name, size in large]
    return f"{need.num_bytes / GIB:.1f}", ", ".join([*shown, f"rest {rest / GIB:.1f}"] if rest >= _SHOWN else shown)
