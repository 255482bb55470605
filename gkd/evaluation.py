"""What evaluation measures. Legend: T response tokens, V shared vocabulary rows."""

from collections.abc import Callable, Sequence

import torch

from gkd.divergences import Divergence
from gkd.logits import Logits, map_chunks, raised
from gkd.packing import PackedRows, pack
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

    def of(student_tV: torch.Tensor, span: slice) -> torch.Tensor:
        return divergence(*teacher.pair(student_tV, span, temperature=temperature))

    return _sum(forward, rollouts, _packed(forward, rollouts), of, rows=rows)


@torch.no_grad()
def negative_log_likelihood_sum(
    forward: ResponseForward, rollouts: Sequence[Rollout], *, rows: int
) -> tuple[float, int]:
    """Sum of -log p(token) in nats over the response tokens in the loss, and their number; their quotient is the
    cross-entropy, its exponential the perplexity.

    Args:
        forward: the student, in eval mode.
        rollouts: whose responses are given, in one forward pass: the caller bounds how many.
        rows: V; the probabilities are normalised over these.
    """
    packed = _packed(forward, rollouts)
    ids_T = packed.response_ids_T.to(forward.device)

    def of(student_tV: torch.Tensor, span: slice) -> torch.Tensor:
        return -student_tV.log_softmax(-1).gather(-1, ids_T[span].unsqueeze(-1)).squeeze(-1)

    return _sum(forward, rollouts, packed, of, rows=rows)


def _packed(forward: ResponseForward, rollouts: Sequence[Rollout]) -> PackedRows:
    return pack([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts], share_rows=forward.share_rows)


def _sum(
    forward: ResponseForward,
    rollouts: Sequence[Rollout],
    packed: PackedRows,
    of: Callable[[torch.Tensor, slice], torch.Tensor],
    *,
    rows: int,
) -> tuple[float, int]:
    """Sum over the tokens in the loss of `of(logits [t, V], their span)` [t], and the number of those tokens."""
    flags = [rollout.loss_mask or (True,) * len(rollout.response_ids) for rollout in rollouts]
    mask_T = torch.tensor([flag for one in flags for flag in one], dtype=torch.bool, device=forward.device)

    def per_token(student: Logits) -> torch.Tensor:
        (value_T,) = map_chunks(
            lambda span: (of(raised(student.rows(span)), span),),
            num_tokens=student.num_tokens,
            num_rows=rows,
            device=student.device,
        )
        return value_T

    counted = forward.through(packed, per_token, num_rows=rows)[mask_T]
    return counted.double().sum().item(), len(counted)
