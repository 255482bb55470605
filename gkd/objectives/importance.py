"""What samples of an older student are worth to the student of now.

Legend: T packed response tokens.
"""

import torch


def importance_ratios(
    student_logprobs_T: torch.Tensor, sampler_logprobs_T: torch.Tensor | None, *, clip: float | None
) -> torch.Tensor:
    """min(p(token now) / p(token when it was sampled), clip) per token [T], without a graph.

    Truncated importance sampling, token by token: the exact weight of a token is the product of the ratios of all that
    precede it too, whose variance grows with the length. Truncation bounds the variance of what is left, at the price
    of a bias where the student has moved far; within the limit, and where the student has not moved, there is none.

    Args:
        student_logprobs_T: log-probabilities under the current student, at temperature 1.
        sampler_logprobs_T: those recorded at sampling; None where they were not: then all ratios are 1.
        clip: largest ratio, at least 1; None for no limit.
    """
    if sampler_logprobs_T is None:
        return torch.ones_like(student_logprobs_T, requires_grad=False)
    ratios_T = (student_logprobs_T.detach() - sampler_logprobs_T).exp()
    return ratios_T if clip is None else ratios_T.clamp(max=clip)
