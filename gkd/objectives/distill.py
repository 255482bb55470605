"""Distillation by a divergence between the student's and the teacher's next-token distributions."""

import torch

from gkd.divergences import Divergence
from gkd.objectives.base import Chunk, ObjectiveInputs, ObjectiveOutput, Staleness
from gkd.signals import ANY_DISTRIBUTION


class Distill:
    """D(p_T || p_S) at every response token (GKD, arXiv 2306.13649, Eq. 2-4), for any divergence.

    No gradient flows through how the tokens were sampled: a rollout is data. `temperature` divides both logits; it is
    the loss temperature, independent of the sampling temperature, and there is no T^2 factor.
    """

    requires = ANY_DISTRIBUTION
    staleness: Staleness = "robust"
    needs_sampler_logprobs = False

    def __init__(self, *, divergence: Divergence, temperature: float) -> None:
        self.divergence = divergence
        self.temperature = temperature

    def __call__(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        """The divergence per token [T] in nats.

        Raises:
            ValueError: if there is no teacher signal, or it holds no distribution.
        """
        (loss_T,) = inputs.loss_per_token(self._divergence)
        return ObjectiveOutput(loss_T=loss_T, mask_T=inputs.mask_T, metrics_T={"divergence": loss_T.detach()})

    def _divergence(self, chunk: Chunk) -> tuple[torch.Tensor]:
        return (self.divergence(*chunk.pair(self.temperature)),)
