"""A reward and a divergence at once: RL fine-tuning that stays near the teacher."""

import torch

from gkd.divergences import Divergence
from gkd.objectives.base import Chunk, ObjectiveInputs, ObjectiveOutput, Staleness
from gkd.objectives.importance import importance_ratios
from gkd.signals import ANY_DISTRIBUTION


class RlGkd:
    """Maximises (1 - alpha) E r(y) - alpha E D(p_T || p_S)(y) over the student's y (GKD, arXiv 2306.13649, Eq. 5).

    The gradient of the first term is REINFORCE: of -(r(y) - b) sum_t log p_S(y_t), y being data; that of the second
    flows through the divergence alone, at given y, as in `Distill`. Each is averaged on its own:

    - the divergence as the reduction says: over tokens, or over each sequence's tokens first (the paper's Eq. 2);
    - the reward's term is a *sum* over the tokens of a sequence and a mean over the sequences of the batch that the
      student wrote, under every reduction. Averaged over tokens it would be the gradient of no expected reward: a
      token of a long response would count less than one of a short response. The dataset's samples have no part in it.

    So the reward's gradient is exact (with `sequence_mean` that of the divergence too), alpha weighs a reward per
    sequence against nats per token, and neither depends on how many samples are the dataset's.

    Baselines are computed from the whole batch before it is split (`gkd.advantages`). Samples of an older student are
    weighted by `importance_ratios`, where log-probabilities were recorded. Log-probabilities and ratios are at
    temperature 1, the divergence at the loss temperature. The loss's *value* says nothing, as in every policy gradient:
    look at the divergence and the rewards.
    """

    requires = ANY_DISTRIBUTION
    staleness: Staleness = "corrected"
    needs_sampler_logprobs = True
    needs_reward = True

    def __init__(self, *, divergence: Divergence, alpha: float, temperature: float, ratio_clip: float) -> None:
        """`alpha` is the divergence's weight, `ratio_clip` the largest weight of a token of an older student."""
        self.divergence = divergence
        self.alpha = alpha
        self.temperature = temperature
        self.ratio_clip = ratio_clip

    def __call__(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        """The loss per token [T]; its metric is the divergence in nats.

        Raises:
            ValueError: if there are no advantages, or there is no teacher signal that holds a distribution.
        """
        if inputs.advantages_N is None or inputs.sequence_scale_N is None:
            raise ValueError("rl_gkd needs the advantages of its samples, and there are no rewards")
        divergence_T, logprobs_T = inputs.per_token(self._terms)
        lengths_N = torch.tensor(inputs.lengths, device=logprobs_T.device)
        weights_T = (inputs.advantages_N * inputs.sequence_scale_N).repeat_interleave(lengths_N)
        weights_T = weights_T * importance_ratios(logprobs_T, inputs.sampler_logprobs_T, clip=self.ratio_clip)
        # Selected, and not just weighted by 0: a token of the dataset may have a log-probability of -inf.
        policy_T = torch.where(inputs.on_policy_T, -weights_T * logprobs_T, torch.zeros_like(logprobs_T))
        return ObjectiveOutput(
            loss_T=self.alpha * divergence_T + (1 - self.alpha) * policy_T,
            mask_T=inputs.mask_T,
            metrics_T={"divergence": divergence_T.detach()},
        )

    def _terms(self, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
        return self.divergence(*chunk.pair(self.temperature)), chunk.student_logprobs(1.0)
