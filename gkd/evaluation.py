"""What evaluation measures. Legend: T response tokens, V shared vocabulary rows."""

from collections.abc import Sequence

import torch

from gkd.divergences import Divergence
from gkd.packing import pack
from gkd.response_forward import ResponseForward
from gkd.signals import TeacherSignal
from gkd.types import Rollout


def exact_match(responses: Sequence[str], references: Sequence[str]) -> float:
    """Share of responses equal to their reference, white space at both ends aside.

    Raises:
        ValueError: if there is none, or the numbers differ.
    """
    if not responses:
        raise ValueError("exact match of no responses is undefined")
    pairs = zip(responses, references, strict=True)
    return sum(response.strip() == reference.strip() for response, reference in pairs) / len(responses)


@torch.inference_mode()
def divergence_sum(
    forward: ResponseForward, rollouts: Sequence[Rollout], signals: Sequence[TeacherSignal], divergence: Divergence
) -> tuple[float, int]:
    """Sum of a divergence over the response tokens in the loss, and their number; their quotient is the mean per token.

    Args:
        forward: the student, in eval mode.
        rollouts: whose responses are compared, in one forward pass: the caller bounds how many.
        signals: the teacher's full logits, one per rollout.
        divergence: at temperature 1, over the rows that the signals hold.
    """
    packed = pack([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts], share_rows=forward.share_rows)
    teacher_TV = torch.cat([signal.tensor() for signal in signals]).to(forward.device).float()
    student_TV = forward(packed)[:, : teacher_TV.shape[-1]].float()
    flags = [rollout.loss_mask or (True,) * len(rollout.response_ids) for rollout in rollouts]
    mask_T = torch.tensor([flag for one in flags for flag in one], dtype=torch.bool, device=forward.device)
    counted = divergence(student_TV, teacher_TV)[mask_T]
    return counted.double().sum().item(), len(counted)
