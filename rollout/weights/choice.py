"""Which wire carries the weights, from where the workers sit."""

from collections.abc import Sequence
from typing import Literal

from gkd.errors import UserError

Wire = Literal["object_store", "nccl", "ipc"]
"""Name of a wire, and of vLLM's backend at its other end."""

_FASTEST_FIRST: tuple[Wire, ...] = ("ipc", "nccl", "object_store")


def choose_wire(
    wanted: Literal["auto"] | Wire, *, sender: str | None, engines: Sequence[Sequence[str]], adapter: bool
) -> Wire:
    """The wire that is wanted, or the fastest that works: `object_store` works everywhere.

    Args:
        wanted: `sync.backend`.
        sender: the GPU of the trainer's rank 0, under a name that is unique in the cluster; None on a CPU host.
        engines: for each rollout engine, at least one, the GPUs of its workers likewise; none on a CPU host.
        adapter: whether only a LoRA adapter travels.

    Raises:
        UserError: if the wanted wire cannot connect these workers.
    """
    assert engines, "without an engine nothing travels"
    if wanted == "auto":
        return next(wire for wire in _FASTEST_FIRST if _obstacle(wire, sender, engines, adapter) is None)
    obstacle = _obstacle(wanted, sender, engines, adapter)
    if obstacle is not None:
        raise UserError("sync.backend", wanted, f"cannot connect these workers: {obstacle}.", "Use auto.")
    return wanted


def _obstacle(wire: Wire, sender: str | None, engines: Sequence[Sequence[str]], adapter: bool) -> str | None:
    """Why a wire cannot connect these workers; None if it can."""
    if wire == "object_store":
        return None
    if adapter:
        return "it carries whole models, and of an adapter (student.lora) only the adapter travels"
    if sender is None or not all(engines):
        return "the trainer and every rollout engine must run on GPUs"
    gpus = [gpu for engine in engines for gpu in engine]
    if wire == "ipc":
        shared = gpus == [sender]
        return None if shared else "a single rollout engine, on one GPU, must share it with the trainer's first rank"
    distinct = len({sender, *gpus}) == 1 + len(gpus)
    return None if distinct else "the trainer's first rank and every rollout worker need a GPU of their own each"
