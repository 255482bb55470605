"""The `nccl` wire: packed buckets of weights broadcast from the trainer's GPU to those of the engines.

The receivers are vLLM's own (backend `nccl`, packed). A broadcast ends only when every engine has entered it, so both
ends work at the same time: the engines are given a bucket's message, and without waiting for them the sender is asked
for the next one, upon which it broadcasts the bucket.

Assumptions: rank 0 of the trainer and every worker of the engines have a GPU of their own, on any nodes; the engines'
nodes reach the trainer's under the address that Ray knows it by. With an NCCL older than 2.29.7 all of these processes
need equal NCCL_* variables. vllm is imported when the sender connects: the trainer's model must be built by then.
"""

import socket
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import ray
import torch

from rollout.weights.packed import buckets, describe, for_engine, pack


class NcclSender:
    """The trainer's end: rank 0 of a group of its own, in which the engines' workers follow."""

    def __init__(self, *, bucket_bytes: int) -> None:
        """`bucket_bytes` is the size at which a bucket is closed; a larger tensor gets a bucket of its own."""
        self._bucket_bytes = bucket_bytes

    def open(self, workers: Sequence[int], modules: Collection[str]) -> list[dict[str, Any]]:
        """What each engine needs to join the group.

        Args:
            workers: how many GPUs each engine has.
            modules: what `held_modules` found in the engines.
        """
        self._modules = frozenset(modules)
        self._meeting_point = {
            "master_address": ray.util.get_node_ip_address(),
            "master_port": _free_port(),
            "world_size": 1 + sum(workers),
        }
        # A bucket is one broadcast: both ends cut a message where it exceeds this size, and ours never do so earlier.
        packing = {"packed": True, "packed_buffer_size_bytes": self._bucket_bytes, "packed_num_buffers": 1}
        offsets = [1 + sum(workers[:i]) for i in range(len(workers))]
        return [self._meeting_point | packing | {"rank_offset": offset} for offset in offsets]

    def connect(self) -> None:
        """Join the group, while every engine joins it with what `open` made. Blocks until all have.

        Raises:
            RuntimeError: if NCCL is missing or switched off.
        """
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        stream = torch.cuda.current_stream()
        self._group = trainer_init(self._meeting_point)
        # vLLM moves the process to a stream of its own here; DeepSpeed was set up on the one before.
        torch.cuda.set_stream(stream)
        if self._group.disabled:
            raise RuntimeError("vLLM found no NCCL library in the trainer's process, or VLLM_DISABLE_PYNCCL is set")

    def send(self, weights: Iterable[tuple[str, torch.Tensor]], tied: dict[str, str]) -> Iterator[dict[str, Any]]:
        """Yield a bucket's message, and broadcast the bucket when asked for the next."""
        device = self._group.device
        for bucket in buckets(for_engine(weights, tied, self._modules), self._bucket_bytes):
            packed = pack(bucket, device)  # before the engines are told, so that an error leaves none of them waiting
            yield describe(bucket)
            stream = torch.cuda.current_stream(device)
            self._group.broadcast(packed, src=0, stream=stream)
            stream.synchronize()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
