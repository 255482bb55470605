"""What evaluation measures. Legend: T response tokens, V shared vocabulary rows."""

from collections.abc import Sequence

import torch

from gkd.divergences import Divergence
from gkd.logits import Logits, map_chunks, raised
from gkd.packing import pack
from gkd.response_forward import ResponseForward
from gkd.teacher_view import TeacherView
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


@torch.no_grad()
def divergence_sum(
    forward: ResponseForward,
    rollouts: Sequence[Rollout],
    teacher: TeacherView,
    divergence: Divergence,
    *,
    rows: int,
    temperature: float = 1.0,
) -> tuple[float, int]:
    """Sum of a divergence over the response tokens in the loss, and their number; their quotient is the mean per token.

    Args:
        forward: the student, in eval mode.
        rollouts: whose responses are compared, in one forward pass: the caller bounds how many.
        teacher: its view of those responses, in the same order.
        divergence: what is summed.
        rows: V.
        temperature: divides both logits.
    """
    packed = pack([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts], share_rows=forward.share_rows)
    flags = [rollout.loss_mask or (True,) * len(rollout.response_ids) for rollout in rollouts]
    mask_T = torch.tensor([flag for one in flags for flag in one], dtype=torch.bool, device=forward.device)

    def per_token(student: Logits) -> torch.Tensor:
        def of(span: slice) -> tuple[torch.Tensor]:
            return (divergence(*teacher.pair(raised(student.rows(span)), span, temperature=temperature)),)

        (loss_T,) = map_chunks(of, num_tokens=student.num_tokens, num_rows=rows, device=student.device)
        return loss_T

    counted = forward.through(packed, per_token, num_rows=rows)[mask_T]
    return counted.double().sum().item(), len(counted)
