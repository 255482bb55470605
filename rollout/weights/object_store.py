"""The `object_store` wire: buckets of weights through Ray's object store, for CPU hosts and across nodes.

The trainer returns each bucket as one object, which Ray copies from where the weights lie; every engine on a node is
handed the same copy.
Assumptions: sender and receivers are workers of one Ray cluster; the driver owns the objects; a bucket fits into the
object store. vLLM finds the receiver through its plug-in entry point (`register`), in every process it starts. vllm is
imported only there: the trainer's process builds transformers models, which must happen without vllm.
"""

import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rollout.weights.packed import for_engine, held_modules

BACKEND = "object_store"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Several tensors. Ray copies each array from where it lies into one object, without serialising it."""

    names: tuple[str, ...]
    """Checkpoint names, as `save_pretrained` writes them."""
    dtypes: tuple[torch.dtype, ...]
    """One per tensor."""
    shapes: tuple[tuple[int, ...], ...]
    """One per tensor."""
    arrays: tuple[np.ndarray, ...]
    """One per tensor: its bytes, uint8."""
    tied: dict[str, str]
    """Alias -> name of a tensor of this bucket that shares its memory."""

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and tensor, sharing memory with the arrays: do not write to them."""
        for name, dtype, shape, array in zip(self.names, self.dtypes, self.shapes, self.arrays, strict=True):
            with warnings.catch_warnings():
                # Arrays from the object store are read-only, which torch can only warn about; nothing writes to them.
                warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
                flat = torch.from_numpy(array)
            yield name, flat.view(dtype).view(shape)


class ObjectStoreSender:
    """The trainer's end: puts tensors together, and copies none."""

    def __init__(self, *, bucket_bytes: int) -> None:
        """`bucket_bytes` is the size at which a bucket is closed; a larger tensor gets a bucket of its own."""
        self._bucket_bytes = bucket_bytes

    def open(self, workers: Sequence[int], modules: Collection[str]) -> list[dict[str, Any]]:
        """There is nothing to agree on: each receiver finds out itself what its model holds."""
        return [{} for _ in workers]

    def connect(self) -> None:
        """There is no connection to open."""

    def send(self, weights: Iterable[tuple[str, torch.Tensor]], tied: dict[str, str]) -> Iterator[dict[str, Bucket]]:
        """Yield the buckets in order, each made only when it is asked for. Their arrays are the weights themselves."""
        waiting: list[tuple[str, torch.Tensor]] = []
        waiting_bytes = 0
        for name, tensor in weights:
            if waiting and waiting_bytes + tensor.nbytes > self._bucket_bytes:
                yield {"bucket": _bucket(waiting, tied)}
                waiting, waiting_bytes = [], 0
            waiting.append((name, tensor))
            waiting_bytes += tensor.nbytes
        if waiting:
            yield {"bucket": _bucket(waiting, tied)}


def _bucket(tensors: list[tuple[str, torch.Tensor]], tied: dict[str, str]) -> Bucket:
    names = tuple(name for name, _ in tensors)
    flat = [tensor.detach().contiguous().view(-1).view(torch.uint8).cpu() for _, tensor in tensors]
    return Bucket(
        names=names,
        dtypes=tuple(tensor.dtype for _, tensor in tensors),
        shapes=tuple(tuple(tensor.shape) for _, tensor in tensors),
        arrays=tuple(tensor.numpy() for tensor in flat),
        tied={alias: name for alias, name in tied.items() if name in names},
    )


def register() -> None:
    """Make the receiver known to vLLM. Called by vLLM in each of its processes (entry point `vllm.general_plugins`)."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:  # vLLM may load plug-ins several times
        WeightTransferEngineFactory.register_engine(BACKEND, _receiver_class())


def _receiver_class() -> type:
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    @dataclass
    class InitInfo(WeightTransferInitInfo):
        """Nothing to agree on."""

    @dataclass
    class UpdateInfo(WeightTransferUpdateInfo):
        """One bucket."""

        bucket: Bucket

    class ObjectStoreReceiver(WeightTransferEngine):
        """The engine's end: reads buckets and reloads the model from them."""

        init_info_cls = InitInfo
        update_info_cls = UpdateInfo

        def init_transfer_engine(self, init_info: InitInfo) -> None:
            """There is no connection to open."""

        def start_weight_update(self) -> None:
            # vLLM repacks linear weights for its kernels; `load_weights` alone would write into nothing.
            initialize_layerwise_reload(self.model)

        def update_weights(self, update_info: dict) -> None:
            # The base class synchronises an accelerator here, and CPU hosts have none.
            self.receive_weights(self.parse_update_info(update_info))

        def receive_weights(self, update_info: UpdateInfo) -> None:
            bucket = update_info.bucket
            self.model.load_weights(for_engine(bucket.tensors(), bucket.tied, held_modules(self.model)))

        def finish_weight_update(self) -> None:
            finalize_layerwise_reload(self.model, self.model_config)

        def shutdown(self) -> None:
            """There is nothing to release."""

    return ObjectStoreReceiver
