"""How many bytes of tensors are alive at once, counted as torch makes and frees them."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class LiveMemory(TorchDispatchMode):
    """`with LiveMemory() as memory: ...` counts the storages that are made meanwhile."""

    def __init__(self):
        super().__init__()
        self.num_bytes = 0
        self.peak_bytes = 0
        self._alive = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._count, output)
        return output

    def _count(self, tensor):
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if size == 0 or address in self._alive:
            return
        self._alive.add(address)
        self.num_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.num_bytes)
        weakref.finalize(storage, self._free, address, size)

    def _free(self, address, size):
        self._alive.discard(address)
        self.num_bytes -= size
