"""Maximum likelihood on the response tokens."""

from gkd.objectives.base import ObjectiveInputs, ObjectiveOutput, Staleness
from gkd.signals import SignalKind


class SupervisedFineTuning:
    """-log p_S(y_t | y_<t, x) per response token. Needs no teacher."""

    requires: frozenset[SignalKind] = frozenset()
    staleness: Staleness = "robust"
    needs_sampler_logprobs = False

    def __init__(self, *, temperature: float) -> None:
        self.temperature = temperature

    def __call__(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        """The negative log-likelihood per token [T] in nats."""
        (loss_T,) = inputs.loss_per_token(lambda chunk: (-chunk.student_logprobs(self.temperature),))
        return ObjectiveOutput(loss_T=loss_T, mask_T=inputs.mask_T, metrics_T={"nll": loss_T.detach()})
