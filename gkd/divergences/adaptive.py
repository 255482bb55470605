"""The adaptive KL divergence (AKL) of Wu et al., arXiv 2404.02657."""

import torch

from gkd.divergences.common import kl, log_probs


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
        teacher_logits_TV: [T, V].
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
    student_TV, teacher_TV = log_probs(student_logits_TV, teacher_logits_TV)
    head_T, tail_T = _gaps(student_TV, teacher_TV, head_mass)
    total_T = head_T + tail_T
    total_T = total_T.masked_fill(total_T == 0, 1)
    return head_T / total_T * kl(teacher_TV, student_TV) + tail_T / total_T * kl(student_TV, teacher_TV)


@torch.no_grad()
def _gaps(student_TV: torch.Tensor, teacher_TV: torch.Tensor, head_mass: float) -> tuple[torch.Tensor, torch.Tensor]:
    """sum |T - S| over the teacher's head and over its tail, [T] each, from log-probabilities."""
    sorted_TV, order_TV = teacher_TV.exp().sort(dim=-1, descending=True, stable=True)
    gap_TV = (sorted_TV - student_TV.exp().gather(-1, order_TV)).abs()
    is_tail_TV = sorted_TV.cumsum(-1) > head_mass
    is_tail_TV[:, :1] = False
    return gap_TV.masked_fill(is_tail_TV, 0).sum(-1), gap_TV.masked_fill(~is_tail_TV, 0).sum(-1)
