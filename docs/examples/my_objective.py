"""An objective of your own: the reverse KL at every token, weighted by how sure the teacher is, with an entropy bonus.

objective: {type: custom, path: docs/examples/my_objective.py:SureReverseKl, kwargs: {bonus: 0.01}}

`gkd check` tries it on a few synthetic tokens, with every teacher signal named in `requires`.
"""

import torch

from gkd.divergences import reverse_kl
from gkd.objectives import ObjectiveInputs, ObjectiveOutput


class SureReverseKl:
    """max_v p_T(v) * KL(S || T) - bonus * H(S) per token."""

    requires = {"full_logits", "hidden_states"}  # any one of them will do
    staleness = "robust"  # everything is computed under the current student

    def __init__(self, *, temperature: float, bonus: float) -> None:
        self.temperature, self.bonus = temperature, bonus

    def __call__(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        """One loss per token; gkd masks and averages."""
        loss_T, entropy_T = inputs.per_token(self._of_chunk)  # a few tokens at a time, so that memory stays small
        return ObjectiveOutput(loss_T=loss_T, mask_T=inputs.mask_T, metrics_T={"entropy": entropy_T.detach()})

    def _of_chunk(self, chunk):
        student_tV, teacher_tV = chunk.pair(self.temperature)
        entropy_t = torch.special.entr(student_tV.softmax(-1)).sum(-1)
        sure_t = teacher_tV.softmax(-1).amax(-1)
        return sure_t * reverse_kl(student_tV, teacher_tV) - self.bonus * entropy_t, entropy_t
