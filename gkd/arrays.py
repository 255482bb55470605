"""Tensors as NumPy arrays, which Ray's object store hands over without a copy. NumPy has no bfloat16: its bits travel
as uint16."""

import warnings

import numpy as np
import torch


def to_array(tensor: torch.Tensor) -> np.ndarray:
    """A float32 or bfloat16 tensor from any device.

    Raises:
        TypeError: for another dtype.
    """
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    if tensor.dtype == torch.float32:
        return tensor.numpy()
    raise TypeError(f"arrays are made of float32 or bfloat16 tensors, not of {tensor.dtype}")


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """The tensor that `to_array` was given. Shares memory: do not write to it."""
    with warnings.catch_warnings():
        # Arrays from the object store are read-only, which torch can only warn about; nothing writes to them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor
