"""Distillation by a divergence between the student's and the teacher's next-token distributions."""

from gkd.divergences import Divergence
from gkd.objectives.base import ObjectiveInputs, ObjectiveOutput
from gkd.signals import SignalKind


class Distill:
    """D(p_T || p_S) at every response token (GKD, arXiv 2306.13649, Eq. 2-4), for any divergence.

    No gradient flows through how the tokens were sampled: a rollout is data. `temperature` divides both logits; it is
    the loss temperature, independent of the sampling temperature, and there is no T^2 factor.
    """

    requires = frozenset({SignalKind.FULL_LOGITS})

    def __init__(self, *, divergence: Divergence, temperature: float) -> None:
        self.divergence = divergence
        self.temperature = temperature

    def __call__(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        """The divergence per token [T] in nats.

        Raises:
            ValueError: if there are no teacher logits, or their shape is not the student's.
        """
        if inputs.teacher_logits_TV is None:
            raise ValueError("the distill objective needs teacher logits")
        # Upcast before dividing: bfloat16 logits would lose bits to the division.
        student_TV = inputs.student_logits_TV.float() / self.temperature
        teacher_TV = inputs.teacher_logits_TV.float() / self.temperature
        loss_T = self.divergence(student_TV, teacher_TV)
        return ObjectiveOutput(loss_T=loss_T, mask_T=inputs.mask_T, metrics_T={"divergence": loss_T.detach()})
