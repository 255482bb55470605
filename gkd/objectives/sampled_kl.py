"""The reverse KL through the tokens that the student wrote: on-policy distillation as policy gradient.

Legend: T packed response tokens, t of a chunk, N sequences.
"""

import math
from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from gkd.objectives.base import Chunk, ObjectiveInputs, ObjectiveOutput, Staleness
from gkd.objectives.importance import importance_ratios
from gkd.signals import ANY_LOGPROBS


class SampledKl:
    """-w_t A_t log p_S(y_t) at every token that the student wrote, A_t = log p_T(y_t) - log p_S(y_t) being its reward.

    The loss that most systems call on-policy distillation (tinker-cookbook's at its defaults, but for the truncation of
    w_t): the gradient is that of the reverse KL at the visited states, in expectation over the tokens, from one
    log-probability of the teacher per token. A_t is minus Schulman's k1 ("Approximating KL Divergence", 2020), without
    a graph.

    - `gamma`: a token earns sum_{t' >= t} gamma^(t' - t) A_t'. 0 credits it with itself alone, which is the gradient of
      the KL at given prefixes, as in `Distill`; 1 is the exact gradient of the KL between whole responses.
    - `length_normalize` divides that sum by the number of tokens in it, so that early tokens do not outweigh late ones.
    - w_t = min(p_S(y_t) / p_sampler(y_t), `ratio_clip`), without a graph, where samples may be of an older student or
      of an engine that rounds otherwise. Truncated importance sampling and not PPO's clipping: every batch is trained
      on once, so there is no second step to hold back. Without recorded log-probabilities w_t = 1, and the gradient is
      biased by the samples' age.

    There is no baseline: one over the batch would make the result depend on how it is split. A token of the dataset
    has no sampler, so the dataset's sequences are left out; they still count in the reducer's mean, so that with a
    share lambda of on-policy tokens the loss is lambda times that of these tokens alone.

    The expectation is that of p_S at the loss temperature: exact where `rollout.temperature` is the same and `top_p` 1.
    Ratios are at temperature 1, which is what engines record: they correct for the samples' age where
    `rollout.temperature` and `top_p` are 1. The value is w_t times minus what the token earns: with gamma 0 its mean
    estimates the reverse KL in nats.
    """

    requires = ANY_LOGPROBS
    staleness: Staleness = "corrected"
    needs_sampler_logprobs = True

    def __init__(self, *, temperature: float, gamma: float, length_normalize: bool, ratio_clip: float | None) -> None:
        """`ratio_clip` is the largest weight, at least 1; None for no limit."""
        self.temperature = temperature
        self.gamma = gamma
        self.length_normalize = length_normalize
        self.ratio_clip = math.inf if ratio_clip is None else ratio_clip

    def __call__(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        """The loss per token [T], of the student's own tokens alone.

        Raises:
            ValueError: if there is no teacher signal, or it was made at another temperature.
        """
        student_T, teacher_T, raw_T = inputs.per_token(self._logprobs)
        own_T = inputs.mask_T & inputs.on_policy_T
        reward_T = teacher_T - student_T.detach()
        earned_T = earned(reward_T, own_T, inputs.lengths, gamma=self.gamma, length_normalize=self.length_normalize)
        ratio_T = importance_ratios(raw_T, inputs.sampler_logprobs_T, clip=None)
        weight_T = ratio_T.clamp(max=self.ratio_clip)
        loss_T = -weight_T * earned_T * unit(student_T, own_T)
        metrics = kl_estimates(reward_T) | {
            "ratio": ratio_T,
            "ratio_deviation": (ratio_T - 1).abs(),
            "clip_fraction": (ratio_T > self.ratio_clip).float(),
        }
        return ObjectiveOutput(
            loss_T=loss_T,
            mask_T=own_T,
            partial_metrics_T={name: (values_T, own_T) for name, values_T in metrics.items()},
        )

    def _logprobs(self, chunk: Chunk) -> tuple[torch.Tensor, ...]:
        return logprobs_of(chunk, self.temperature)


def logprobs_of(chunk: Chunk, temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities [t] of the response's tokens: student's (with a graph) and teacher's at the loss temperature,
    and the student's at temperature 1, to be compared with those that were recorded."""
    student_t = chunk.student_logprobs(temperature)
    with torch.no_grad():
        raw_t = student_t if temperature == 1 else chunk.student_logprobs(1.0)
    return student_t, chunk.teacher_logprobs(temperature), raw_t.detach()


def unit(logprobs_T: torch.Tensor, counted_T: torch.Tensor) -> torch.Tensor:
    """1, with the gradient of the log-probability: what a weight is multiplied by for a score-function gradient.

    Tokens that do not count have none: one that the student never writes, in the dataset's text, would give NaN.
    """
    logprobs_T = torch.where(counted_T, logprobs_T, torch.zeros_like(logprobs_T))
    return (logprobs_T - logprobs_T.detach()).exp()


def earned(
    reward_T: torch.Tensor,
    counted_T: torch.Tensor,
    lengths: Sequence[int],
    *,
    gamma: float,
    length_normalize: bool,
    later_only: bool = False,
) -> torch.Tensor:
    """[T] sum_{t' >= t} gamma^(t' - t) reward_t' over the rest of the token's own sequence.

    Args:
        reward_T: per token, without a graph.
        counted_T: tokens whose reward counts; the others add nothing.
        lengths: tokens of each of the N sequences.
        gamma: discount per token, within [0, 1].
        length_normalize: divide by the number of counted tokens in the sum, not by the sum of their discounts.
        later_only: leave out the token's own reward: the sum is over t' > t.
    """
    if gamma == 0 and later_only:
        return torch.zeros_like(reward_T)
    sum_T = _discounted_sum(torch.where(counted_T, reward_T, torch.zeros_like(reward_T)), lengths, gamma)
    num_T = _discounted_sum(counted_T.to(reward_T.dtype), lengths, 1.0)
    if later_only:
        sum_T, num_T = gamma * _at_later(sum_T, lengths, 1), _at_later(num_T, lengths, 1)
    return sum_T / num_T.clamp(min=1) if length_normalize else sum_T


def kl_estimates(reward_T: torch.Tensor) -> dict[str, torch.Tensor]:
    """Schulman's k1 and k3 of KL(S || T) in nats per token of the student, from log p_T - log p_S: both unbiased for
    tokens of the current student, k3 never negative and of less variance near the teacher."""
    return {"reverse_kl": -reward_T, "reverse_kl_k3": reward_T.expm1() - reward_T}


def _discounted_sum(values_T: torch.Tensor, lengths: Sequence[int], gamma: float) -> torch.Tensor:
    """Every token's sum over the rest of its sequence. By doubling: log2(longest) steps, no loop over tokens."""
    reach, sum_T = 1, values_T  # the sum of the next `reach` tokens of each
    while gamma > 0 and reach < max(lengths, default=0):
        sum_T = sum_T + gamma**reach * _at_later(sum_T, lengths, reach)
        reach *= 2
    return sum_T


def _at_later(values_T: torch.Tensor, lengths: Sequence[int], steps: int) -> torch.Tensor:
    """What stands `steps` tokens later in the same sequence; 0 beyond its end."""
    lengths_N = torch.tensor(lengths, device=values_T.device)
    ends_T = lengths_N.cumsum(0).repeat_interleave(lengths_N)
    within_T = torch.arange(len(values_T), device=values_T.device) + steps < ends_T
    shifted_T = pad(values_T[steps:], (0, min(steps, len(values_T))))
    # Selected and not multiplied: another sequence's infinite reward must not leak as 0 * inf.
    return torch.where(within_T, shifted_T, torch.zeros_like(shifted_T))
