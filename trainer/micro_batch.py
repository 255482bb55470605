"""From a few scored samples to what an objective sees of them: packed, through the student, beside the teacher.

Legend: T response tokens of a micro-batch, V shared vocabulary rows.
"""

from collections.abc import Callable, Sequence

import torch

from gkd.logits import HeadLogits, Logits
from gkd.objectives.base import ObjectiveInputs
from gkd.packing import pack
from gkd.response_forward import ResponseForward
from gkd.types import ScoredRollout
from trainer.sample_data import sample_inputs
from trainer.share import RankShare
from trainer.teacher_source import TeacherSource

Use = Callable[[ObjectiveInputs, torch.Tensor], torch.Tensor]
"""What is made of the inputs and their tokens' weights [T]: a scalar, within the student's forward pass."""


class MicroBatches:
    """Makes forward passes of a rank's share. Every rank makes equally many, and in the same order."""

    def __init__(self, forward: ResponseForward, teacher: TeacherSource, *, rows: int) -> None:
        """`rows` is the number of vocabulary rows in the loss."""
        self._forward = forward
        self._teacher = teacher
        self._rows = rows

    def through(
        self, samples: Sequence[ScoredRollout], share: RankShare, places: Sequence[int], use: Use
    ) -> torch.Tensor:
        """One forward pass.

        Args:
            samples: the share's samples.
            share: the share.
            places: which of them pass. Without any the pass still has to be made, for the ranks wait for each other:
                the shortest sample stands in, with every token masked.
            use: what is made of it.

        Returns:
            What `use` returned.
        """
        stand_in = min(range(len(samples)), key=lambda i: len(samples[i].rollout.token_ids))
        members = [samples[i] for i in places or (stand_in,)]
        packed = pack(
            [s.rollout.prompt_ids for s in members],
            [s.rollout.response_ids for s in members],
            share_rows=self._forward.share_rows,
        )
        device = self._forward.device
        mask_T = _loss_mask(members) if places else torch.zeros(len(packed.response_ids_T), dtype=torch.bool)
        token_weights = torch.tensor([share.weights[i] for i in places or (stand_in,)])
        weights_T = torch.repeat_interleave(token_weights, torch.tensor(packed.response_lengths)).to(device)
        teacher = self._teacher.view(members)
        scales = [share.sequence_scales[i] for i in places or (stand_in,)]

        def use_logits(logits: Logits) -> torch.Tensor:
            inputs = ObjectiveInputs(
                student=logits,
                num_rows=self._rows,
                teacher=teacher,
                response_ids_T=packed.response_ids_T.to(device),
                mask_T=mask_T.to(device),
                loss_weights_T=torch.where(mask_T.to(device), weights_T, 0),
                lengths=packed.response_lengths,
                on_policy_N=torch.tensor([s.rollout.source == "student" for s in members]).to(device),
                student_hidden_TH=logits.hidden_TH if isinstance(logits, HeadLogits) else None,
                **sample_inputs(members, scales, device),
            )
            return use(inputs, weights_T)

        return self._forward.through(packed, use_logits, num_rows=self._rows)


def _loss_mask(samples: Sequence[ScoredRollout]) -> torch.Tensor:
    """[T] bool, which response tokens count."""
    flags = [r.loss_mask or (True,) * len(r.response_ids) for r in (s.rollout for s in samples)]
    return torch.tensor([flag for mask in flags for flag in mask], dtype=torch.bool)
