"""What the generalised JSD and the skew KLs have in common: KLs to a mixture of student and teacher."""

from dataclasses import dataclass

import torch

from gkd.divergences.closed_form import Rows, expectation, log_ratio, through_softmax


@dataclass(frozen=True, slots=True, kw_only=True)
class ToMixture:
    """teacher_factor KL(T || M) + student_factor KL(S || M) with M = weight T + (1 - weight) S.

    The mixture is taken in probability space, never by mixing logits. With u = d/dS of it, up to a constant,

        u = student_factor log(S / M) - (1 - weight) (teacher_factor T + student_factor S) / M,

    the gradient in the student's logits is S (u - sum S u). Where the factors are the weights themselves, as in the
    JSD, the second term is a constant.
    """

    weight: float
    """The teacher's in the mixture, in (0, 1)."""
    teacher_factor: float
    """Of KL(T || M)."""
    student_factor: float
    """Of KL(S || M)."""

    def value(self, student: Rows, teacher: Rows) -> torch.Tensor:
        """[t] nats."""
        log_m_tV = self._mixture(student, teacher).log_()
        parts = ((self.teacher_factor, teacher), (self.student_factor, student))
        values = [factor * expectation(p, log_ratio(p, log_m_tV)) for factor, p in parts if factor]
        return torch.stack(values).sum(0)

    def gradient(self, student: Rows, teacher: Rows) -> torch.Tensor:
        """[t, V]."""
        mixture_tV = self._mixture(student, teacher)
        slopes_tV = torch.zeros_like(mixture_tV)
        if (self.teacher_factor, self.student_factor) != (self.weight, 1 - self.weight):
            shares_tV = (teacher.p_tV * self.teacher_factor).add_(student.p_tV, alpha=self.student_factor)
            slopes_tV.sub_(shares_tV.div_(mixture_tV), alpha=1 - self.weight)
        if self.student_factor:
            slopes_tV.add_(log_ratio(student, mixture_tV.log_()), alpha=self.student_factor)
        return through_softmax(student, slopes_tV)

    def _mixture(self, student: Rows, teacher: Rows) -> torch.Tensor:
        """M [t, V]; above 0 also where neither has mass: nothing is looked up there, but 0 / 0 would be NaN."""
        mixture_tV = (teacher.p_tV * self.weight).add_(student.p_tV, alpha=1 - self.weight)
        return mixture_tV.clamp_(min=torch.finfo(mixture_tV.dtype).tiny)
