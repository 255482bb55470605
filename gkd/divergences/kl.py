"""The two directions of the Kullback-Leibler divergence, S = student, T = teacher (arXiv 2306.13649, section 2).

The convention trap: `torch.nn.functional.kl_div(input, target)` is KL(target || input), and papers write either order.
Here the name says which distribution the expectation is taken over: forward = teacher, reverse = student.
"""

import torch

from gkd.divergences.closed_form import Rows, apply, expectation, log_ratio, through_softmax


def forward_kl(student_logits_TV: torch.Tensor, teacher_logits_TV: torch.Tensor) -> torch.Tensor:
    """KL(T || S) per token: mode covering, the loss of supervised distillation. Its gradient in the student's logits is
    S - T.

    Args:
        student_logits_TV: [T, V], any float dtype; raised to float32 inside.
        teacher_logits_TV: [T, V]; a constant, no gradient flows into it.

    Returns:
        [T] nats, >= 0, unbounded. No mask, no mean.

    Raises:
        ValueError: if the shapes differ.
    """
    return apply(ForwardKl(), student_logits_TV, teacher_logits_TV)


def reverse_kl(student_logits_TV: torch.Tensor, teacher_logits_TV: torch.Tensor) -> torch.Tensor:
    """KL(S || T) per token: mode seeking. Its gradient in the student's logits is p_S * (log p_S - log p_T - KL).

    Args:
        student_logits_TV: [T, V], any float dtype; raised to float32 inside.
        teacher_logits_TV: [T, V]; a constant, no gradient flows into it.

    Returns:
        [T] nats, >= 0, unbounded. No mask, no mean.

    Raises:
        ValueError: if the shapes differ.
    """
    return apply(ReverseKl(), student_logits_TV, teacher_logits_TV)


class ForwardKl:
    """KL(T || S) in closed form."""

    def value(self, student: Rows, teacher: Rows) -> torch.Tensor:
        """[t] nats."""
        return expectation(teacher, log_ratio(teacher, student.log_p_tV))

    def value_and_gradient(self, student: Rows, teacher: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """[t] and [t, V]."""
        return self.value(student, teacher), student.p_tV - teacher.p_tV


class ReverseKl:
    """KL(S || T) in closed form."""

    def value(self, student: Rows, teacher: Rows) -> torch.Tensor:
        """[t] nats."""
        return expectation(student, log_ratio(student, teacher.log_p_tV))

    def value_and_gradient(self, student: Rows, teacher: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """[t] and [t, V]."""
        slopes_tV = log_ratio(student, teacher.log_p_tV)
        value_t = expectation(student, slopes_tV)
        return value_t, through_softmax(student, slopes_tV, mean_t=value_t)
