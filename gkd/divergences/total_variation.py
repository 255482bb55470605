"""The total variation distance, the largest difference in probability that student and teacher give to any event."""

import torch

from gkd.divergences.closed_form import Rows, apply, through_softmax


def total_variation(student_logits_TV: torch.Tensor, teacher_logits_TV: torch.Tensor) -> torch.Tensor:
    """TV(T, S) = 1/2 sum |T - S| per token: symmetric, bounded, and a metric. As a distillation loss: Wen et al.,
    arXiv 2307.15190 (f-distill).

    1 - TV is the probability that a token sampled from the student is accepted in speculative decoding (arXiv
    2211.17192). Pinsker: TV <= sqrt(KL / 2), for either direction of the KL.

    The gradient in the student's logits is 1/2 S (s - sum S s), s = sign(S - T), of which no entry exceeds 1/4. It is
    that of a distance: it does not shrink as the student nears the teacher (where both are equal it is 0), and it
    vanishes where the student gives no mass to what the teacher says. Start near the teacher, or from a KL.

    Args:
        student_logits_TV: [T, V], any float dtype; raised to float32 inside.
        teacher_logits_TV: [T, V]; a constant, no gradient flows into it.

    Returns:
        [T], in [0, 1] up to rounding. No mask, no mean.

    Raises:
        ValueError: if the shapes differ.
    """
    return apply(TotalVariation(), student_logits_TV, teacher_logits_TV)


class TotalVariation:
    """TV(T, S) in closed form."""

    def value(self, student: Rows, teacher: Rows) -> torch.Tensor:
        """[t]."""
        return 0.5 * (student.p_tV - teacher.p_tV).abs_().sum(-1)

    def value_and_gradient(self, student: Rows, teacher: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """[t] and [t, V]."""
        gap_tV = student.p_tV - teacher.p_tV
        return 0.5 * gap_tV.abs().sum(-1), through_softmax(student, gap_tV.sign_().mul_(0.5))
