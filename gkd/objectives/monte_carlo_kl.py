"""The reverse KL at every position from a few tokens drawn there.

Legend: T packed response tokens, t of a chunk, m draws a position, V rows.
"""

from functools import partial

import torch

from gkd.objectives.base import Chunk, ObjectiveInputs, ObjectiveOutput, Staleness
from gkd.objectives.sampled_kl import kl_estimates
from gkd.signals import WHOLE_DISTRIBUTION


class MonteCarloKl:
    """KL(S || T) per token, estimated without bias from m tokens drawn from the current student at each position.

    With f = log p_S - log p_T (Schulman's k1) the value is the mean of f over the draws. Its gradient is that of
    sum_i (f_i - b_i) log p_S(a_i) / m, the first factor without a graph; b_i is the mean of the *other* draws' f
    (leave-one-out), which costs no bias and takes away the noise that the KL's own size makes, against a little of its
    own where draws are few; with one draw there is none. The value's variance is exactly proportional to 1/m, the
    gradient's tends to be: it is that of a U-statistic of order 2.

    What the field's multi-sample losses do, to be compared with the exact sum that `distill` with `reverse_kl` takes
    from the same signal; prefer that one otherwise. Tokens are drawn anew in every step, so neither old samples nor the
    dataset's text are a bias, and all sequences count. The draws come from torch's generator: another split into
    micro-batches or ranks draws other tokens.
    """

    requires = WHOLE_DISTRIBUTION
    staleness: Staleness = "robust"
    needs_sampler_logprobs = False

    def __init__(self, *, temperature: float, num_draws: int) -> None:
        self.temperature = temperature
        self.num_draws = num_draws

    def __call__(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        """The estimate per token [T] in nats; it may be negative.

        Raises:
            ValueError: if there is no teacher signal, or it holds no whole distribution.
        """
        uniform_Tm = torch.rand(inputs.student.num_tokens, self.num_draws, device=inputs.student.device)
        loss_T, k3_T = inputs.per_token(partial(self._estimate, uniform_Tm=uniform_Tm))
        metrics = {"reverse_kl": loss_T.detach(), "reverse_kl_k3": k3_T}
        return ObjectiveOutput(loss_T=loss_T, mask_T=inputs.mask_T, metrics_T=metrics)

    def _estimate(self, chunk: Chunk, *, uniform_Tm: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        student_tV, teacher_tV = (logits_tV.log_softmax(-1) for logits_tV in chunk.pair(self.temperature))
        ids_tm = _drawn(student_tV.detach(), uniform_Tm[chunk.span])
        student_tm, teacher_tm = student_tV.gather(-1, ids_tm), teacher_tV.gather(-1, ids_tm)
        gap_tm = student_tm.detach() - teacher_tm
        advantage_tm = gap_tm - _mean_of_others(gap_tm) if self.num_draws > 1 else gap_tm
        score_t = (advantage_tm * student_tm).mean(-1)
        # The score's own value says nothing; only its gradient is wanted.
        loss_t = gap_tm.mean(-1) + (score_t - score_t.detach())
        return loss_t, kl_estimates(-gap_tm)["reverse_kl_k3"].mean(-1)


def _drawn(log_p_tV: torch.Tensor, uniform_tm: torch.Tensor) -> torch.Tensor:
    """[t, m] token ids, by the inverse of the cumulative distribution: the same for the same uniforms."""
    cumulative_tV = log_p_tV.exp().cumsum(-1)
    total_t1 = cumulative_tV[:, -1:]
    # Below the total, so that no token of probability 0 after the last possible one is drawn.
    point_tm = torch.minimum(uniform_tm * total_t1, torch.nextafter(total_t1, torch.zeros_like(total_t1)))
    return torch.searchsorted(cumulative_tV, point_tm, right=True)


def _mean_of_others(values_tm: torch.Tensor) -> torch.Tensor:
    return (values_tm.sum(-1, keepdim=True) - values_tm) / (values_tm.shape[-1] - 1)
