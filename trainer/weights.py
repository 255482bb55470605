"""The student's weights as they leave it: under checkpoint names, a bucket at a time.

With ZeRO 3 every rank holds a part of each weight. They are gathered here bucket by bucket, never the whole model at
once; all ranks go through the same stream, and rank 0 uses what it yields.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

Gathered = Callable[[Sequence[torch.nn.Parameter]], AbstractContextManager[None]]
"""Makes sharded parameters whole while the context is open; every rank enters together."""


def not_sharded(_parameters: Sequence[torch.nn.Parameter]) -> AbstractContextManager[None]:
    """The `Gathered` of a model that is whole already."""
    return nullcontext()


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor that leaves the student."""

    name: str
    """Its name in a checkpoint of the model in memory."""
    sources: tuple[torch.Tensor, ...]
    """The parameters and buffers that it is made from."""
    compute: Callable[[], torch.Tensor]
    """Makes it, while its sources are whole."""


def stream(
    entries: Iterable[Entry],
    *,
    gathered: Gathered,
    bucket_bytes: int,
    convert: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = dict,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of every entry, gathered in buckets.

    Args:
        entries: what leaves, in order.
        gathered: how sharded sources become whole.
        bucket_bytes: most bytes gathered at once; a larger tensor is gathered alone.
        convert: from names in memory to names in a checkpoint, for the entries of one bucket.
    """
    for bucket in _buckets(entries, bucket_bytes):
        sharded = [s for entry in bucket for s in entry.sources if isinstance(s, torch.nn.Parameter)]
        with torch.no_grad(), gathered(sharded):
            tensors = convert({entry.name: entry.compute() for entry in bucket})
        # A tensor holds its memory itself: it stays whole when the parameter is sharded again.
        yield from tensors.items()


def _buckets(entries: Iterable[Entry], bucket_bytes: int) -> Iterator[list[Entry]]:
    bucket: list[Entry] = []
    total = 0
    for entry in entries:
        size = sum(getattr(s, "ds_numel", s.numel()) * s.element_size() for s in entry.sources)
        if bucket and total + size > bucket_bytes:
            yield bucket
            bucket, total = [], 0
        bucket.append(entry)
        total += size
    if bucket:
        yield bucket


def checkpoint_weights(
    model: Any, *, gathered: Gathered = not_sharded, bucket_bytes: int = 2**30
) -> Iterator[tuple[str, torch.Tensor]]:
    """What `save_pretrained` would write, each tensor once.

    transformers keeps some weights fused in memory under other names than its checkpoints have (mixtures of experts);
    a rollout engine loads checkpoint names, and what it is not sent it serves unchanged, silently.

    Args:
        model: a `PreTrainedModel`.
        gathered: how sharded parameters become whole.
        bucket_bytes: most bytes gathered at once.
    """
    aliases = tied_names(model)
    entries = [
        Entry(name, (tensor,), tensor.detach)
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name not in aliases
    ]
    return stream(entries, gathered=gathered, bucket_bytes=bucket_bytes, convert=checkpoint_names(model))


def checkpoint_names(model: Any) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Turns a model's tensors in memory into those of its checkpoint."""
    from transformers.core_model_loading import revert_weight_conversion

    return lambda tensors: dict(revert_weight_conversion(model, tensors))


def tied_names(model: Any) -> dict[str, str]:
    """Alias -> name of the parameter that it is (a tied head, for most). Aliases are not in a checkpoint."""
    state = model.state_dict(keep_vars=True)
    known_aliases = model.all_tied_weights_keys
    owners: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name in sorted(state, key=lambda name: name in known_aliases):  # owners before their aliases
        owner = owners.setdefault(id(state[name]), name)
        if owner != name:
            tied[name] = owner
    return tied
