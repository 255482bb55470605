"""The two directions of the Kullback-Leibler divergence, S = student, T = teacher (arXiv 2306.13649, section 2).

The convention trap: `torch.nn.functional.kl_div(input, target)` is KL(target || input), and papers write either order.
Here the name says which distribution the expectation is taken over: forward = teacher, reverse = student.
"""

import torch

from gkd.divergences.common import kl, log_probs


def forward_kl(student_logits_TV: torch.Tensor, teacher_logits_TV: torch.Tensor) -> torch.Tensor:
    """KL(T || S) per token: mode covering, the loss of supervised distillation.

    Args:
        student_logits_TV: [T, V], any float dtype; raised to float32 inside.
        teacher_logits_TV: [T, V].

    Returns:
        [T] nats, >= 0, unbounded. No mask, no mean.

    Raises:
        ValueError: if the shapes differ.
    """
    student_TV, teacher_TV = log_probs(student_logits_TV, teacher_logits_TV)
    return kl(teacher_TV, student_TV)


def reverse_kl(student_logits_TV: torch.Tensor, teacher_logits_TV: torch.Tensor) -> torch.Tensor:
    """KL(S || T) per token: mode seeking. Its gradient in the student's logits is p_S * (log p_S - log p_T - KL).

    Args:
        student_logits_TV: [T, V], any float dtype; raised to float32 inside.
        teacher_logits_TV: [T, V].

    Returns:
        [T] nats, >= 0, unbounded. No mask, no mean.

    Raises:
        ValueError: if the shapes differ.
    """
    student_TV, teacher_TV = log_probs(student_logits_TV, teacher_logits_TV)
    return kl(student_TV, teacher_TV)
