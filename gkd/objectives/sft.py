"""Maximum likelihood on the response tokens."""

from torch.nn.functional import cross_entropy

from gkd.objectives.base import ObjectiveInputs, ObjectiveOutput
from gkd.signals import SignalKind


class SupervisedFineTuning:
    """-log p_S(y_t | y_<t, x) per response token. Needs no teacher."""

    requires: frozenset[SignalKind] = frozenset()

    def __init__(self, *, temperature: float) -> None:
        self.temperature = temperature

    def __call__(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        """The negative log-likelihood per token [T] in nats."""
        logits_TV = inputs.student_logits_TV.float() / self.temperature
        loss_T = cross_entropy(logits_TV, inputs.response_ids_T, reduction="none")
        return ObjectiveOutput(loss_T=loss_T, mask_T=inputs.mask_T, metrics_T={"nll": loss_T.detach()})
