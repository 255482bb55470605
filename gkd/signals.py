"""What a teacher says about a response, and in which form it travels.

A signal travels as NumPy arrays: Ray's object store hands those over without a copy. Legend: T response tokens of one
sequence, V shared vocabulary rows.
"""

import warnings
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch


class SignalKind(StrEnum):
    """The forms of a teacher signal. Objectives say which they require, teachers say which they provide."""

    FULL_LOGITS = "full_logits"
    HIDDEN_STATES = "hidden_states"
    TOP_K = "top_k"
    SAMPLED_LOGPROBS = "sampled_logprobs"
    ATTENTION_RELATIONS = "attention_relations"


@dataclass(frozen=True, slots=True)
class FullLogits:
    """Exact teacher logits over the shared vocabulary, at temperature 1."""

    logits_TV: np.ndarray
    """[T, V] float32, or uint16 holding the bits of bfloat16 (NumPy has no bfloat16). Row t is the distribution of
    response token t given everything before it."""

    @classmethod
    def from_tensor(cls, logits_TV: torch.Tensor) -> "FullLogits":
        """Take [T, V] float32 or bfloat16 logits from any device.

        Raises:
            TypeError: for another dtype.
        """
        logits_TV = logits_TV.detach().cpu().contiguous()
        if logits_TV.dtype == torch.bfloat16:
            return cls(logits_TV.view(torch.uint16).numpy())
        if logits_TV.dtype == torch.float32:
            return cls(logits_TV.numpy())
        raise TypeError(f"teacher logits are float32 or bfloat16, not {logits_TV.dtype}")

    def tensor(self) -> torch.Tensor:
        """The logits [T, V] as a tensor of the dtype that they were computed in. Shares memory: do not write to it."""
        with warnings.catch_warnings():
            # Arrays from the object store are read-only, which torch can only warn about; nothing writes to them.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            tensor = torch.from_numpy(self.logits_TV)
        return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


TeacherSignal = FullLogits
"""The union of signal types; a new one is added here and to the objectives that understand it."""
