"""What the wires share: which tensors an engine is sent, and how they are packed for vLLM's own receivers.

vLLM's `nccl` and `ipc` receivers load exactly the names that they are sent, and read a bucket as one block of bytes in
which the tensors stand end to end, in the order of the message.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch

Weights = Iterable[tuple[str, torch.Tensor]]
"""Checkpoint names and tensors."""


def held_modules(model: torch.nn.Module) -> tuple[str, ...]:
    """The last parts of the names of a model's modules; asked of an engine by `engine.apply_model(held_modules)`."""
    return tuple(sorted({name.rpartition(".")[2] for name, _ in model.named_modules(remove_duplicate=False)}))


def for_engine(weights: Weights, tied: dict[str, str], modules: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights, each followed by those of its aliases that the engines' model holds.

    With tied embeddings some of vLLM's models keep a head module of their own (Qwen2, GPT-2, OPT): if they are not sent
    the alias they serve the *old* head, silently. Others have no such module (Gemma-2) and refuse it.

    Args:
        weights: each tensor once.
        tied: alias -> name of the tensor that it shares.
        modules: what `held_modules` found in the engines.
    """
    held = [(alias, name) for alias, name in tied.items() if alias.split(".")[-2] in modules]
    for name, tensor in weights:
        yield name, tensor
        yield from ((alias, tensor) for alias, owner in held if owner == name)


def buckets(weights: Weights, bucket_bytes: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """The weights in order, in buckets of one dtype each; a tensor larger than `bucket_bytes` gets a bucket of its own.

    The receivers view each tensor where it lies in the block. After a tensor of a narrower dtype a wider one could
    begin at an address that torch cannot view it at, so a change of dtype closes a bucket.
    """
    bucket: list[tuple[str, torch.Tensor]] = []
    total = 0
    for name, tensor in weights:
        if bucket and (total + tensor.nbytes > bucket_bytes or tensor.dtype != bucket[0][1].dtype):
            yield bucket
            bucket, total = [], 0
        bucket.append((name, tensor))
        total += tensor.nbytes
    if bucket:
        yield bucket


def describe(bucket: Sequence[tuple[str, torch.Tensor]]) -> dict[str, Any]:
    """What a receiver must know of a bucket to read it, under the names of vLLM's update infos."""
    return {
        "names": [name for name, _ in bucket],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
        "shapes": [list(tensor.shape) for _, tensor in bucket],
    }


def pack(bucket: Sequence[tuple[str, torch.Tensor]], device: torch.device) -> torch.Tensor:
    """A bucket's bytes, copied into one block on `device`: uint8 [bytes]."""
    return torch.cat([tensor.detach().to(device).contiguous().view(-1).view(torch.uint8) for _, tensor in bucket])
