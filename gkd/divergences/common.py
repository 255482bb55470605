"""What every divergence shares: upcast, shape check, log-probabilities, mixture, KL."""

import math

import torch


def log_probs(student_logits_TV: torch.Tensor, teacher_logits_TV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 log-probabilities [T, V] of student and teacher.

    Both are raised to float32 *before* the softmax: a float32 student against a bfloat16 teacher otherwise gives
    negative divergences. float64 stays float64, so that tests can compare exactly.

    Raises:
        ValueError: if the shapes differ; vocabularies are cut to their shared rows before the loss.
    """
    if student_logits_TV.shape != teacher_logits_TV.shape:
        raise ValueError(
            f"student logits {tuple(student_logits_TV.shape)} and teacher logits {tuple(teacher_logits_TV.shape)} must "
            "have the same shape: cut both to the shared vocabulary rows first"
        )
    dtype = torch.float64 if student_logits_TV.dtype == torch.float64 else torch.float32
    return student_logits_TV.to(dtype).log_softmax(-1), teacher_logits_TV.to(dtype).log_softmax(-1)


def log_mixture(log_p_TV: torch.Tensor, log_q_TV: torch.Tensor, *, weight: float) -> torch.Tensor:
    """log(weight p + (1 - weight) q) [T, V], for 0 < weight < 1.

    The mixture is taken in probability space (a logsumexp of log-probabilities), never by mixing logits. Where neither
    p nor q has mass the result is a 0 that means nothing: logaddexp(-inf, -inf) would spoil the gradient with NaN, and
    `kl` from p or from q does not look there.
    """
    never_TV = log_p_TV.isneginf() & log_q_TV.isneginf()
    return torch.logaddexp(
        log_p_TV.masked_fill(never_TV, 0) + math.log(weight), log_q_TV.masked_fill(never_TV, 0) + math.log1p(-weight)
    )


def kl(log_p_TV: torch.Tensor, log_q_TV: torch.Tensor) -> torch.Tensor:
    """Per-token KL(p || q) [T] in nats from log-probabilities.

    A token that p never emits adds 0 ("never" includes what is too small for exp, as 0 times an infinite log-ratio is
    NaN); where q is 0 and p is not, the divergence is infinite. Rounding can leave a sum slightly below 0 when p is
    close to q: the value is raised to 0, the gradient is left as it is.
    """
    never_TV = log_p_TV < math.log(torch.finfo(log_p_TV.dtype).tiny)
    log_ratio_TV = log_p_TV.masked_fill(never_TV, 0) - log_q_TV.masked_fill(never_TV, 0)
    value_T = (log_p_TV.exp() * log_ratio_TV).sum(-1)
    return torch.where(value_T < 0, value_T - value_T.detach(), value_T)
