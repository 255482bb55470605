"""What the generalised JSD and the skew KLs have in common: KLs to a mixture of student and teacher."""

from dataclasses import dataclass

import torch

from gkd.divergences.closed_form import Rows, expectation, log_ratio, through_softmax

_LARGEST_SAFE = 0.95
"""Weight up to which 1 + x, at least 1 - weight, keeps all but a digit."""
_CLOSE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class ToMixture:
    """teacher_factor KL(T || M) + student_factor KL(S || M) with M = weight T + (1 - weight) S.

    The mixture is taken in probability space, never by mixing logits. Its slope with respect to S is

        student_factor (log(S / M) + 1) - (1 - weight) (teacher_factor T + student_factor S) / M.

    Up to a constant, which the softmax takes away, the fraction is rest (T - S) / M with rest = teacher_factor - weight
    (teacher_factor + student_factor): exact also where S is close to T, and nothing for the JSD.
    """

    weight: float
    """The teacher's in the mixture, in (0, 1)."""
    teacher_factor: float
    """Of KL(T || M)."""
    student_factor: float
    """Of KL(S || M)."""

    def value(self, student: Rows, teacher: Rows) -> torch.Tensor:
        """[t] nats."""
        value_t = torch.zeros_like(student.p_tV[:, 0])
        if self.teacher_factor:
            value_t.add_(self._of_teacher(student, teacher), alpha=self.teacher_factor)
        if self.student_factor:
            ratio_tV = _log_ratio_to_mixture(student, teacher, self.weight)
            value_t.add_(expectation(student, ratio_tV), alpha=self.student_factor)
        return value_t

    def value_and_gradient(self, student: Rows, teacher: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """[t] nats and [t, V]."""
        if self.student_factor:
            slopes_tV = _log_ratio_to_mixture(student, teacher, self.weight).mul_(self.student_factor)
            value_t = expectation(student, slopes_tV)
        else:
            slopes_tV, value_t = torch.zeros_like(student.p_tV), torch.zeros_like(student.p_tV[:, 0])
        mean_t = value_t.clone()
        if self.teacher_factor:
            value_t.add_(self._of_teacher(student, teacher), alpha=self.teacher_factor)
        rest = self.teacher_factor - self.weight * (self.teacher_factor + self.student_factor)
        if rest:
            mixture_tV = _mixture(student, teacher, self.weight)
            slopes_tV.add_((student.p_tV - teacher.p_tV).div_(mixture_tV), alpha=(1 - self.weight) * rest)
            mean_t = expectation(student, slopes_tV)
        return value_t, through_softmax(student, slopes_tV, mean_t)

    def _of_teacher(self, student: Rows, teacher: Rows) -> torch.Tensor:
        """KL(T || M) [t]."""
        return expectation(teacher, _log_ratio_to_mixture(teacher, student, 1 - self.weight))


def _mixture(p: Rows, q: Rows, weight: float) -> torch.Tensor:
    """p + weight (q - p) [t, V]; above 0 also where neither has mass: nothing is looked up there, but 0 / 0 would be
    NaN.
    """
    mixture_tV = (q.p_tV * weight).add_(p.p_tV, alpha=1 - weight)
    return mixture_tV.clamp_(min=torch.finfo(mixture_tV.dtype).tiny)


def _log_ratio_to_mixture(p: Rows, q: Rows, weight: float) -> torch.Tensor:
    """log(p / M) [t, V] with M = p + weight (q - p); anything finite where p is 0.

    It is -log(1 + x) with x = weight (q - p) / p: exact where M is close to p, where the difference of two logarithms
    would be rounding alone, which a normalised JSD divides by beta (1 - beta). That difference is taken only where
    there may be next to nothing of p in M, so that 1 + x has lost its digits.
    """
    x_tV = (q.p_tV - p.p_tV).mul_(weight).div_(p.p_tV.clamp(min=torch.finfo(p.p_tV.dtype).tiny))
    if weight <= _LARGEST_SAFE:
        return x_tV.log1p_().neg_()
    close_tV = x_tV.abs() < _CLOSE
    ratio_tV = log_ratio(p, _mixture(p, q, weight).log_())
    return torch.where(close_tV, x_tV.log1p_().neg_(), ratio_tV, out=ratio_tV)
