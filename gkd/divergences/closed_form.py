"""What the divergences share: value and gradient in closed form, a block of tokens at a time.

Under autograd a divergence makes some ten tensors [T, V] forward and more backward, and each passes through memory.
Here nothing but the logits is kept, and everything between them and the result fits a cache. Legend: T tokens, t tokens
of a block, V vocabulary rows.
"""

import math
from collections.abc import Iterator
from functools import cached_property
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


class Rows:
    """The distributions of a block's tokens; what is not asked for is not made."""

    def __init__(self, logits_tV: torch.Tensor, dtype: torch.dtype) -> None:
        """Logits [t, V] are raised to `dtype` *before* the softmax: a float32 student against a bfloat16 teacher
        otherwise gives negative divergences.
        """
        self._logits_tV = logits_tV.to(dtype)

    @cached_property
    def log_p_tV(self) -> torch.Tensor:
        """[t, V] log-probabilities in nats, float32 (float64 where the student's logits are)."""
        return self._logits_tV.log_softmax(-1)

    @cached_property
    def p_tV(self) -> torch.Tensor:
        """[t, V] probabilities."""
        return self._logits_tV.softmax(-1)


class ClosedForm(Protocol):
    """A divergence of the student S and the teacher T."""

    def value(self, student: Rows, teacher: Rows) -> torch.Tensor:
        """[t] nats. What rounding leaves below 0 is raised to 0 elsewhere."""
        ...

    def value_and_gradient(self, student: Rows, teacher: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """That, and its gradient [t, V] with respect to the student's logits."""
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
    if torch.is_grad_enabled() and student_logits_TV.requires_grad:
        return _Divergence.apply(student_logits_TV, teacher_logits_TV, form)
    values = [form.value(student, teacher) for _, student, teacher in _blocks(student_logits_TV, teacher_logits_TV)]
    return _never_negative(torch.cat(values))


class _Divergence(Function):
    """Makes the gradient together with the value, as they have most in common, and keeps it instead of the logits."""

    @staticmethod
    def forward(
        ctx: Any, student_logits_TV: torch.Tensor, teacher_logits_TV: torch.Tensor, form: ClosedForm
    ) -> torch.Tensor:
        values, gradient_TV = [], torch.empty_like(student_logits_TV)
        for span, student, teacher in _blocks(student_logits_TV, teacher_logits_TV):
            value_t, gradient_TV[span] = form.value_and_gradient(student, teacher)
            values.append(value_t)
        ctx.save_for_backward(gradient_TV)
        return _never_negative(torch.cat(values))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight_T: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient_TV,) = ctx.saved_tensors
        weighted_TV = gradient_TV * weight_T.unsqueeze(-1).to(gradient_TV.dtype)
        # A token that does not count adds nothing, also where its divergence is infinite and its gradient no number.
        return weighted_TV.index_fill_(0, (weight_T == 0).nonzero()[:, 0], 0), None, None


def _never_negative(value_T: torch.Tensor) -> torch.Tensor:
    """Rounding can leave a sum slightly below 0 when S is close to T."""
    return value_T.clamp_(min=0)


def _blocks(student_logits_TV: torch.Tensor, teacher_logits_TV: torch.Tensor) -> Iterator[tuple[slice, Rows, Rows]]:
    num_tokens, num_rows = student_logits_TV.shape
    dtype = _wide(student_logits_TV)
    size = block_tokens(num_rows, student_logits_TV.device.type)
    for first in range(0, max(1, num_tokens), size):
        span = slice(first, first + size)
        yield span, Rows(student_logits_TV[span], dtype), Rows(teacher_logits_TV[span], dtype)


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


def through_softmax(student: Rows, slopes_tV: torch.Tensor, mean_t: torch.Tensor | None = None) -> torch.Tensor:
    """From a divergence's slopes with respect to the probabilities S to those of the logits: S (u - sum S u) [t, V].

    A constant added to all slopes of a token changes nothing. The slopes are overwritten; `mean_t` is sum S u, where it
    is known.
    """
    mean_t = expectation(student, slopes_tV) if mean_t is None else mean_t
    return slopes_tV.sub_(mean_t.unsqueeze(-1)).mul_(student.p_tV)
