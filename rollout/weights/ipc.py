"""The `ipc` wire: packed buckets of weights in GPU memory that the trainer exports and the engine maps (CUDA IPC).

The receiver is vLLM's own (backend `ipc`, packed); it copies each tensor out of the block before it answers. torch
keeps an exported block until a receiver has let go of it, and counts one receiver for each export: so every bucket has
a block and an export of its own, and there is one engine. Whoever asks for the next bucket before the engine is done
with one has both in GPU memory, nothing worse.

Assumptions: rank 0 of the trainer and the only engine, of one worker, are processes on the same GPU that share the
host's namespaces; torch's allocator does not use expandable segments.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import reduce_tensor

from rollout.weights.packed import buckets, describe, for_engine, pack


class IpcSender:
    """The trainer's end: exports blocks of its GPU's memory."""

    def __init__(self, *, bucket_bytes: int) -> None:
        """`bucket_bytes` is the size at which a bucket is closed; a larger tensor gets a bucket of its own."""
        self._bucket_bytes = bucket_bytes

    def open(self, workers: Sequence[int], modules: Collection[str]) -> list[dict[str, Any]]:
        """What the engine needs to know.

        Args:
            workers: how many GPUs each engine has: one engine, one GPU.
            modules: what `held_modules` found in the engine.
        """
        assert list(workers) == [1], "an export has one receiver"
        self._modules = frozenset(modules)
        return [{"packed": True}]

    def connect(self) -> None:
        """There is no connection to open."""

    def send(self, weights: Iterable[tuple[str, torch.Tensor]], tied: dict[str, str]) -> Iterator[dict[str, Any]]:
        """Yield a bucket's message with the handle of its memory, which is filled by then."""
        device, name = _gpu()
        for bucket in buckets(for_engine(weights, tied, self._modules), self._bucket_bytes):
            packed = pack(bucket, device)
            torch.cuda.current_stream(device).synchronize()
            _, handle = reduce_tensor(packed)
            yield describe(bucket) | {
                "ipc_handles": {name: handle},
                "tensor_sizes": [tensor.nbytes for _, tensor in bucket],
            }


def _gpu() -> tuple[torch.device, str]:
    """This process's GPU, and its name that is the same in every process."""
    index = torch.cuda.current_device()
    return torch.device("cuda", index), str(torch.cuda.get_device_properties(index).uuid)
