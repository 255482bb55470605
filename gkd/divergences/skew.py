"""The skewed KL divergences of DistiLLM (arXiv 2402.03898): the second distribution is mixed with a bit of the first.

With D(p, q) = KL(p || alpha p + (1 - alpha) q), `alpha` is always the weight of the distribution that the expectation
is taken over, as in the authors' code (`skewed_forward_kl`, `skewed_reverse_kl`, lam = 0.1).

- Bounds: 0 <= D <= min(-ln alpha, (1 - alpha) KL(p || q)). So D is finite for alpha > 0 even where q is 0 and p is not.
- alpha -> 0: D -> KL(p || q), which alpha = 0 is. alpha -> 1: D -> 0, and D / (1 - alpha)^2 -> 1/2 sum (p - q)^2 / p;
  at alpha = 1 there is nothing to learn from, so that it is refused.
- alpha skew_forward_kl(alpha) + (1 - alpha) skew_reverse_kl(1 - alpha) = generalized_jsd(beta = alpha).
"""

import torch

from gkd.divergences.closed_form import apply
from gkd.divergences.kl import ForwardKl, ReverseKl
from gkd.divergences.mixture import ToMixture


def skew_forward_kl(student_logits_TV: torch.Tensor, teacher_logits_TV: torch.Tensor, *, alpha: float) -> torch.Tensor:
    """KL(T || alpha T + (1 - alpha) S) per token.

    Args:
        student_logits_TV: [T, V], any float dtype; raised to float32 inside.
        teacher_logits_TV: [T, V]; a constant, no gradient flows into it.
        alpha: the teacher's weight in the mixture, 0 <= alpha < 1; 0 is `forward_kl`.

    Returns:
        [T] nats, >= 0 and at most -ln alpha. No mask, no mean.

    Raises:
        ValueError: if the shapes differ, or alpha is not in [0, 1).
    """
    _check("skew_forward_kl", alpha, plain="forward_kl")
    form = ToMixture(weight=alpha, teacher_factor=1.0, student_factor=0.0) if alpha > 0 else ForwardKl()
    return apply(form, student_logits_TV, teacher_logits_TV)


def skew_reverse_kl(student_logits_TV: torch.Tensor, teacher_logits_TV: torch.Tensor, *, alpha: float) -> torch.Tensor:
    """KL(S || alpha S + (1 - alpha) T) per token.

    Args:
        student_logits_TV: [T, V], any float dtype; raised to float32 inside.
        teacher_logits_TV: [T, V]; a constant, no gradient flows into it.
        alpha: the student's weight in the mixture, 0 <= alpha < 1; 0 is `reverse_kl`.

    Returns:
        [T] nats, >= 0 and at most -ln alpha. No mask, no mean.

    Raises:
        ValueError: if the shapes differ, or alpha is not in [0, 1).
    """
    _check("skew_reverse_kl", alpha, plain="reverse_kl")
    form = ToMixture(weight=1 - alpha, teacher_factor=0.0, student_factor=1.0) if alpha > 0 else ReverseKl()
    return apply(form, student_logits_TV, teacher_logits_TV)


def _check(name: str, alpha: float, *, plain: str) -> None:
    if not 0.0 <= alpha < 1.0:
        raise ValueError(
            f"{name}: alpha = {alpha} is not in [0, 1); the divergence is 0 everywhere at alpha = 1. "
            f"Use 0.1 as its authors do, or {plain} for alpha = 0"
        )
