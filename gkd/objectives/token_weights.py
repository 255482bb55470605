"""Weights per token: by its place in the response, by how decided a model is, by how much the two disagree.

None has a graph: a weight is no part of what is minimised. Legend: T packed response tokens, t of a chunk, V rows.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch

from gkd.objectives.base import Chunk, ObjectiveInputs
from gkd.signals import ANY_DISTRIBUTION, ANY_LOGPROBS, SignalKind

_NO_TEACHER: frozenset[SignalKind] = frozenset()


class FirstPart:
    """1 for the first `fraction` of each response's tokens, rounded up, and 0 for the others."""

    requires = _NO_TEACHER

    def __init__(self, *, fraction: float) -> None:
        self.fraction = fraction

    def __call__(self, inputs: ObjectiveInputs) -> torch.Tensor:
        """[T] 0 or 1."""
        # 0.07 of 100 tokens is a little more than 7 in floating point, and must not be 8.
        first = [math.ceil(self.fraction * length - 1e-9) for length in inputs.lengths]
        place_T, first_T = _places(inputs, first)
        return (place_T < first_T).float()


class LinearDecay:
    """From 1 at the first token of each response in a straight line to `last` at its last one."""

    requires = _NO_TEACHER

    def __init__(self, *, last: float) -> None:
        self.last = last

    def __call__(self, inputs: ObjectiveInputs) -> torch.Tensor:
        """[T] between 1 and `last`."""
        place_T, steps_T = _places(inputs, [max(length - 1, 1) for length in inputs.lengths])
        return 1 - (1 - self.last) * place_T / steps_T


class ExponentialDecay:
    """1 at the first token of each response, half of it every `half_life` tokens."""

    requires = _NO_TEACHER

    def __init__(self, *, half_life: float) -> None:
        self.half_life = half_life

    def __call__(self, inputs: ObjectiveInputs) -> torch.Tensor:
        """[T] between 0 and 1."""
        place_T, _ = _places(inputs, inputs.lengths)
        return torch.exp2(-place_T / self.half_life)


class Entropy:
    """H / log V of a model's next-token distribution, or one minus that. The logits are made again for it."""

    def __init__(
        self, *, of: Literal["student", "teacher"], favour: Literal["high", "low"], temperature: float
    ) -> None:
        self.requires = ANY_DISTRIBUTION if of == "teacher" else _NO_TEACHER
        self.of = of
        self.favour = favour
        self.temperature = temperature

    def __call__(self, inputs: ObjectiveInputs) -> torch.Tensor:
        """[T] between 0 and 1."""
        (entropy_T,) = inputs.per_token(self._entropy)
        part_T = (entropy_T / math.log(inputs.num_rows)).clamp(0, 1)
        return part_T if self.favour == "high" else 1 - part_T

    def _entropy(self, chunk: Chunk) -> tuple[torch.Tensor]:
        logits_tW = chunk.pair(self.temperature)[1] if self.of == "teacher" else chunk.student_tV / self.temperature
        log_p_tW = logits_tW.log_softmax(-1)
        return (torch.special.entr(log_p_tW.exp()).sum(-1),)


class Advantage:
    """|log p_T - log p_S| of each response token, at most `cap`. The logits are made again for it."""

    requires = ANY_LOGPROBS

    def __init__(self, *, cap: float, temperature: float) -> None:
        self.cap = cap
        self.temperature = temperature

    def __call__(self, inputs: ObjectiveInputs) -> torch.Tensor:
        """[T] nats, between 0 and `cap`."""
        (gap_T,) = inputs.per_token(self._gap)
        return gap_T.clamp(max=self.cap)

    def _gap(self, chunk: Chunk) -> tuple[torch.Tensor]:
        return ((chunk.teacher_logprobs(self.temperature) - chunk.student_logprobs(self.temperature)).abs(),)


class Custom:
    """A function of the user's own, with its options bound."""

    def __init__(self, function: Any, kwargs: dict[str, Any], *, requires: frozenset[SignalKind]) -> None:
        self.requires = requires
        self._function = function
        self._kwargs = kwargs

    def __call__(self, inputs: ObjectiveInputs) -> torch.Tensor:
        """[T] what it returns."""
        return self._function(inputs, **self._kwargs)


def _places(inputs: ObjectiveInputs, per_sequence: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """[T] each token's place in its response, from 0, and [T] a number per sequence, repeated for its tokens."""
    device = inputs.mask_T.device
    place_T = torch.cat([torch.arange(length, device=device) for length in inputs.lengths])
    numbers_N = torch.tensor(per_sequence, device=device)
    return place_T, numbers_N.repeat_interleave(torch.tensor(inputs.lengths, device=device))
