"""The adaptive KL divergence (AKL) of Wu et al., arXiv 2404.02657."""

from dataclasses import dataclass

import torch

from gkd.divergences.closed_form import Rows, apply
from gkd.divergences.kl import ForwardKl, ReverseKl


def adaptive_kl(student_logits_TV: torch.Tensor, teacher_logits_TV: torch.Tensor, *, head_mass: float) -> torch.Tensor:
    """g_head / (g_head + g_tail) KL(T || S) + g_tail / (g_head + g_tail) KL(S || T) per token.

    g = sum |T - S| over the head or the tail of the *teacher's* distribution. Forward KL learns the head first and
    reverse KL the tail, hence each is weighted by what is still missing there. The weights are constants of the step:
    no gradient flows through them.

    The head is, as in the authors' code (wutaiqiang/LLM_KD_AKL), the teacher's most probable token, and those after it
    for as long as the mass summed so far, including the token, is at most `head_mass`. So the token that crosses the
    threshold belongs to the tail, unless it is the first. Among equally probable tokens the smaller id comes first.
    Their code divides 0 by 0 where student and teacher are equal; here both weights, the loss and its gradient are
    then 0.

    The loss lies between the two KLs, and is half their sum for a vocabulary of two. It is no f-divergence: with a
    top-k signal, where all other tokens are one, it may exceed its exact value.

    Args:
        student_logits_TV: [T, V], any float dtype; raised to float32 inside.
        teacher_logits_TV: [T, V]; a constant, no gradient flows into it.
        head_mass: 0 < head_mass < 1, mu in the authors' code, 0.5 there.

    Returns:
        [T] nats, >= 0, unbounded. No mask, no mean.

    Raises:
        ValueError: if the shapes differ, or head_mass is not inside (0, 1).
    """
    if not 0.0 < head_mass < 1.0:
        raise ValueError(
            f"adaptive_kl: head_mass = {head_mass} is not inside (0, 1); at 1 there is no tail, and at 0 no head. "
            "Use 0.5 as its authors do, forward_kl to weigh all as head, or reverse_kl to weigh all as tail"
        )
    return apply(AdaptiveKl(head_mass), student_logits_TV, teacher_logits_TV)


@dataclass(frozen=True, slots=True)
class AdaptiveKl:
    """The two KLs in closed form, and their weights."""

    head_mass: float
    """Of the teacher's head."""

    def value(self, student: Rows, teacher: Rows) -> torch.Tensor:
        """[t] nats."""
        head_t, tail_t = self._weights(student, teacher)
        return head_t * ForwardKl().value(student, teacher) + tail_t * ReverseKl().value(student, teacher)

    def value_and_gradient(self, student: Rows, teacher: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """[t] and [t, V]."""
        head_t, tail_t = self._weights(student, teacher)
        forward_t, forward_tV = ForwardKl().value_and_gradient(student, teacher)
        reverse_t, reverse_tV = ReverseKl().value_and_gradient(student, teacher)
        gradient_tV = forward_tV.mul_(head_t.unsqueeze(-1)).add_(reverse_tV.mul_(tail_t.unsqueeze(-1)))
        return head_t * forward_t + tail_t * reverse_t, gradient_tV

    def _weights(self, student: Rows, teacher: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the forward and the reverse KL, [t] each."""
        sorted_tV, order_tV = teacher.p_tV.sort(dim=-1, descending=True, stable=True)
        is_tail_tV = sorted_tV.cumsum(-1) > self.head_mass
        is_tail_tV[:, :1] = False
        gap_tV = sorted_tV.sub_(student.p_tV.gather(-1, order_tV)).abs_()
        head_t, tail_t = gap_tV.masked_fill(is_tail_tV, 0).sum(-1), gap_tV.masked_fill(~is_tail_tV, 0).sum(-1)
        total_t = head_t + tail_t
        total_t = total_t.masked_fill(total_t == 0, 1)
        return head_t / total_t, tail_t / total_t
