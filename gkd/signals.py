"""What a teacher says about a response, and in which form it travels.

A signal travels as NumPy arrays (`gkd.arrays`). Legend: T response tokens of one sequence, V shared vocabulary rows, H
width of the teacher's last hidden state, K tokens of a sparse signal.
"""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch

from gkd.arrays import to_array, to_tensor


class SignalKind(StrEnum):
    """The forms of a teacher signal. Objectives say which they require, teachers say which they provide."""

    FULL_LOGITS = "full_logits"
    HIDDEN_STATES = "hidden_states"
    TOP_K = "top_k"
    SAMPLED_LOGPROBS = "sampled_logprobs"
    ATTENTION_RELATIONS = "attention_relations"


WHOLE_DISTRIBUTION = frozenset({SignalKind.FULL_LOGITS, SignalKind.HIDDEN_STATES})
"""Signals that hold the exact distribution over all V rows."""
ANY_DISTRIBUTION = WHOLE_DISTRIBUTION | {SignalKind.TOP_K}
"""Signals that hold a distribution, exact or with its tail in one bucket."""
ANY_LOGPROBS = ANY_DISTRIBUTION | {SignalKind.SAMPLED_LOGPROBS}
"""Signals that hold at least the log-probability of the response's own tokens."""

SPARSE = frozenset({SignalKind.TOP_K, SignalKind.SAMPLED_LOGPROBS})
"""Signals that are made at the loss temperature and cannot be brought to another."""


@dataclass(frozen=True, slots=True)
class FullLogits:
    """Exact teacher logits over the shared vocabulary, at temperature 1."""

    logits_TV: np.ndarray
    """[T, V] float32, or uint16 holding the bits of bfloat16. Row t is the distribution of response token t given
    everything before it."""

    @classmethod
    def from_tensor(cls, logits_TV: torch.Tensor) -> "FullLogits":
        """Take [T, V] float32 or bfloat16 logits from any device.

        Raises:
            TypeError: for another dtype.
        """
        return cls(to_array(logits_TV))

    def tensor(self) -> torch.Tensor:
        """The logits [T, V] as a tensor of the dtype that they were computed in. Shares memory: do not write to it."""
        return to_tensor(self.logits_TV)

    @property
    def num_bytes(self) -> int:
        """Size on the way."""
        return self.logits_TV.nbytes


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """The teacher's last hidden states: with its head (`gkd.head`) exact logits, and H / V of their size."""

    hidden_TH: np.ndarray
    """[T, H] float32, or uint16 holding the bits of bfloat16: the head turns row t into the logits of response token
    t."""
    teacher: str = "teacher"
    """Name of the teacher whose head applies."""

    @property
    def num_bytes(self) -> int:
        """Size on the way."""
        return self.hidden_TH.nbytes


@dataclass(frozen=True, slots=True)
class TopK:
    """Log-probabilities of some tokens at each position, and the mass of all others in one bucket.

    The tokens are the teacher's K most probable, those that the student thought most probable, and the sampled one. It
    is a proper distribution over K + 1 outcomes: nothing is renormalised, clamped or left out.
    """

    ids_TK: np.ndarray
    """[T, K] int32; -1 where there is no further token."""
    logprobs_TK: np.ndarray
    """[T, K] float32, of those tokens at `temperature`, normalised over the V shared rows; -inf where there is none."""
    tail_T: np.ndarray
    """[T] float32, log of the mass of all other rows; -inf where it is 0."""
    sampled_T: np.ndarray
    """[T] float32, log-probability of the response's own token."""
    temperature: float
    """The loss temperature that they were made at: they cannot be brought to another."""

    @property
    def num_bytes(self) -> int:
        """Size on the way."""
        return sum(part.nbytes for part in (self.ids_TK, self.logprobs_TK, self.tail_T, self.sampled_T))


@dataclass(frozen=True, slots=True)
class SampledLogprobs:
    """Log-probabilities of the response's own tokens."""

    logprobs_T: np.ndarray
    """[T] float32, at `temperature`, normalised over the V shared rows."""
    temperature: float
    """The loss temperature that they were made at."""

    @property
    def num_bytes(self) -> int:
        """Size on the way."""
        return self.logprobs_T.nbytes


@dataclass(frozen=True, slots=True)
class Mixture:
    """What several teachers say of one response, to be read as one: p = sum_i w_i p_i, in probability space."""

    parts: tuple[FullLogits | HiddenStates, ...]
    """One per teacher, of the same T tokens."""
    weights: tuple[float, ...]
    """w, one per teacher: positive, and 1 in sum."""

    @property
    def num_bytes(self) -> int:
        """Size on the way."""
        return sum(part.num_bytes for part in self.parts)


TeacherSignal = FullLogits | HiddenStates | TopK | SampledLogprobs | Mixture
"""The union of signal types; a new one is added here and to `gkd.teacher_view`."""
