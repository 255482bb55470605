"""The generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649, Eq. 1)."""

import torch

from gkd.divergences.closed_form import apply
from gkd.divergences.mixture import ToMixture


def generalized_jsd(
    student_logits_TV: torch.Tensor, teacher_logits_TV: torch.Tensor, *, beta: float, normalize: bool = False
) -> torch.Tensor:
    """JSD_beta(T, S) = beta KL(T || M) + (1 - beta) KL(S || M), with M = beta T + (1 - beta) S, per token.

    `beta` is the *teacher's* weight in the mixture, which is taken in probability space, never by mixing logits.
    DistiLLM's `js_distance(lam)` uses the other convention, lam = 1 - beta.

    The divergence shrinks to 0 as beta nears 0 or 1; what stays finite is JSD/beta -> KL(T || S) for beta -> 0 and
    JSD/(1 - beta) -> KL(S || T) for beta -> 1. So beta near 0 acts like forward KL in direction with a smaller step,
    and the endpoints are not the KLs: they are refused here. TRL defines its endpoints as the KLs, which makes its
    loss jump in scale there.

    The gradient in the student's logits is (1 - beta) S (log(S / M) - KL(S || M)).

    Args:
        student_logits_TV: [T, V], any float dtype; raised to float32 inside.
        teacher_logits_TV: [T, V]; a constant, no gradient flows into it.
        beta: 0 < beta < 1.
        normalize: divide by beta (1 - beta), so that both limits above are the KLs themselves.

    Returns:
        [T] nats, >= 0 and (unnormalised) at most the entropy of (beta, 1 - beta), so at most ln 2.

    Raises:
        ValueError: if the shapes differ, or beta is not inside (0, 1).
    """
    if not 0.0 < beta < 1.0:
        nearest = "forward_kl" if beta <= 0 else "reverse_kl"
        raise ValueError(
            f"generalized_jsd: beta = {beta} is not inside (0, 1); the divergence is 0 at both ends. "
            f"Use {nearest} for the limit at beta = {0 if beta <= 0 else 1}"
        )
    form = ToMixture(weight=beta, teacher_factor=beta, student_factor=1 - beta)
    jsd_T = apply(form, student_logits_TV, teacher_logits_TV)
    return jsd_T / (beta * (1 - beta)) if normalize else jsd_T
