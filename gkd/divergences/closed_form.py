"""What the divergences share: value and gradient in closed form, a block of tokens at a time.

Under autograd a divergence makes some ten tensors [T, V] forward and more backward, and each passes through memory.
Here nothing but the logits is kept, and everything between them and the result fits a cache. Legend: T tokens, t tokens
of a block, V vocabulary rows.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

BLOCK_ELEMENTS = {"cpu": 2**20, "cuda": 2**24}
"""Size [t, V] of a block, at most, unless one token is more. On CPUs, where 2**16 to 2**20 take the same time on one
thread, large ones let several threads meet less often: beside other busy processes every meeting is a wait."""


def block_tokens(num_rows: int, device_type: str) -> int:
    """Tokens of a block."""
    return max(1, BLOCK_ELEMENTS[device_type] // max(1, num_rows))


@dataclass(frozen=True, slots=True)
class Rows:
    """The distributions of a block's tokens."""

    log_p_tV: torch.Tensor
    """[t, V] log-probabilities in nats, float32 (float64 where the student's logits are)."""
    p_tV: torch.Tensor
    """[t, V] probabilities."""

    @classmethod
    def of(cls, logits_tV: torch.Tensor, dtype: torch.dtype) -> "Rows":
        """Raised to `dtype` *before* the softmax: a float32 student against a bfloat16 teacher otherwise gives negative
        divergences.
        """
        log_p_tV = logits_tV.to(dtype).log_softmax(-1)
        return cls(log_p_tV, log_p_tV.exp())


class ClosedForm(Protocol):
    """A divergence of the student S and the teacher T."""

    def value(self, student: Rows, teacher: Rows) -> torch.Tensor:
        """[t] nats. What rounding leaves below 0 is raised to 0 elsewhere."""
        ...

    def gradient(self, student: Rows, teacher: Rows) -> torch.Tensor:
        """[t, V], with respect to the student's logits."""
        ...


def apply(form: ClosedForm, student_logits_TV: torch.Tensor, teacher_logits_TV: torch.Tensor) -> torch.Tensor:
    """The divergence [T] per token, float32 (float64 where the student's logits are), >= 0.

    It can be differentiated once, with respect to the student's logits.

    Raises:
        ValueError: if the shapes differ; vocabularies are cut to their shared rows before the loss.
    """
    if student_logits_TV.shape != teacher_logits_TV.shape:
        raise ValueError(
            f"student logits {tuple(student_logits_TV.shape)} and teacher logits {tuple(teacher_logits_TV.shape)} must "
            "have the same shape: cut both to the shared vocabulary rows first"
        )
    anchor_T = _Gradient.apply(student_logits_TV, teacher_logits_TV, form)
    return _Value.apply(anchor_T, student_logits_TV.detach(), teacher_logits_TV.detach(), form)


class _Gradient(Function):
    """Keeps the logits, and makes the gradient of them. Its result, zeros [T], stands for what the value depends on.

    The value is a step of its own, which keeps nothing, for the sake of `gkd.logits.map_chunks`: what it does again in
    the backward pass ends as soon as all that is kept is there, and so does not make the value a second time.
    """

    @staticmethod
    def forward(
        ctx: Any, student_logits_TV: torch.Tensor, teacher_logits_TV: torch.Tensor, form: ClosedForm
    ) -> torch.Tensor:
        ctx.save_for_backward(student_logits_TV, teacher_logits_TV)
        ctx.form = form
        return student_logits_TV.new_zeros(len(student_logits_TV), dtype=_wide(student_logits_TV))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight_T: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        student_logits_TV, teacher_logits_TV = ctx.saved_tensors
        gradient_TV = torch.empty_like(student_logits_TV)
        for span, student, teacher in _blocks(student_logits_TV, teacher_logits_TV):
            gradient_tV = ctx.form.gradient(student, teacher)
            gradient_TV[span] = gradient_tV.mul_(weight_T[span].unsqueeze(-1))
        return gradient_TV, None, None


class _Value(Function):
    """The divergence of logits whose gradient belongs to the anchor."""

    @staticmethod
    def forward(
        _ctx: Any,
        anchor_T: torch.Tensor,
        student_logits_TV: torch.Tensor,
        teacher_logits_TV: torch.Tensor,
        form: ClosedForm,
    ) -> torch.Tensor:
        value_T = torch.empty_like(anchor_T)
        for span, student, teacher in _blocks(student_logits_TV, teacher_logits_TV):
            value_T[span] = form.value(student, teacher)
        # Rounding can leave a sum slightly below 0 when S is close to T.
        return value_T.clamp_(min=0)

    @staticmethod
    @once_differentiable
    def backward(_ctx: Any, weight_T: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return weight_T, None, None, None


def _blocks(student_logits_TV: torch.Tensor, teacher_logits_TV: torch.Tensor) -> Iterator[tuple[slice, Rows, Rows]]:
    num_tokens, num_rows = student_logits_TV.shape
    dtype = _wide(student_logits_TV)
    size = block_tokens(num_rows, student_logits_TV.device.type)
    for first in range(0, num_tokens, size):
        span = slice(first, first + size)
        yield span, Rows.of(student_logits_TV[span], dtype), Rows.of(teacher_logits_TV[span], dtype)


def _wide(logits_TV: torch.Tensor) -> torch.dtype:
    """float64 stays, so that tests can compare exactly."""
    return torch.float64 if logits_TV.dtype == torch.float64 else torch.float32


def log_ratio(p: Rows, log_q_tV: torch.Tensor) -> torch.Tensor:
    """log(p / q) [t, V], and 0 where p is 0.

    "0" includes what is too small for exp: times an infinite log-ratio it would be NaN. Where q is 0 and p is not, the
    ratio is infinite.
    """
    never_tV = p.log_p_tV < math.log(torch.finfo(p.log_p_tV.dtype).tiny)
    return (p.log_p_tV - log_q_tV).masked_fill_(never_tV, 0)


def expectation(p: Rows, values_tV: torch.Tensor) -> torch.Tensor:
    """sum p v [t]."""
    return (p.p_tV * values_tV).sum(-1)


def through_softmax(student: Rows, slopes_tV: torch.Tensor) -> torch.Tensor:
    """From a divergence's slopes with respect to the probabilities S to those of the logits: S (u - sum S u) [t, V].

    A constant added to all slopes of a token changes nothing. The slopes are overwritten.
    """
    mean_t1 = expectation(student, slopes_tV).unsqueeze(-1)
    return slopes_tV.sub_(mean_t1).mul_(student.p_tV)
