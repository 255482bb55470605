"""Sparse teacher signals, made where the teacher's logits are.

Legend: T response tokens, t tokens of a chunk, V shared rows, M tokens of the student's choice, C candidates.
"""

from collections.abc import Iterator

import numpy as np
import torch

from gkd.logits import Logits, chunk_tokens, raised, tempered
from gkd.signals import SampledLogprobs, TopK


@torch.no_grad()
def top_k_signal(
    logits: Logits, response_ids_T: torch.Tensor, *, k: int, temperature: float, student_ids_TM: torch.Tensor | None
) -> TopK:
    """The teacher's top k, the student's, and the sampled token; everything else in one bucket.

    Args:
        logits: of the teacher, [T, V].
        response_ids_T: [T] int64, the sampled tokens.
        k: how many of the teacher's most probable tokens.
        temperature: of the loss.
        student_ids_TM: [T, M] int64, what the student thought most probable, -1 where nothing; None for nothing at all.
            Ids of V and above are left out: the student's head may have rows that the teacher's has not.
    """
    chunks = [
        _top_k(log_p_tV, ids_t, student_tM, k)
        for log_p_tV, ids_t, student_tM in _chunks(logits, response_ids_T, temperature, student_ids_TM)
    ]
    ids, logprobs, tails, sampled = (
        np.concatenate([part.cpu().numpy() for part in column]) for column in zip(*chunks, strict=True)
    )
    return TopK(ids_TK=ids, logprobs_TK=logprobs, tail_T=tails, sampled_T=sampled, temperature=temperature)


@torch.no_grad()
def sampled_signal(logits: Logits, response_ids_T: torch.Tensor, *, temperature: float) -> SampledLogprobs:
    """Log-probabilities of the sampled tokens.

    Args:
        logits: of the teacher, [T, V].
        response_ids_T: [T] int64.
        temperature: of the loss.
    """
    parts = [
        log_p_tV.gather(-1, ids_t.unsqueeze(-1)).squeeze(-1).cpu().numpy()
        for log_p_tV, ids_t, _ in _chunks(logits, response_ids_T, temperature, None)
    ]
    return SampledLogprobs(np.concatenate(parts), temperature)


def _chunks(
    logits: Logits, response_ids_T: torch.Tensor, temperature: float, student_ids_TM: torch.Tensor | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """Log-probabilities [t, V] with what belongs to their tokens; at least one chunk, if an empty one."""
    size = chunk_tokens(logits.num_rows, logits.device.type)
    for first in range(0, max(logits.num_tokens, 1), size):
        span = slice(first, min(first + size, logits.num_tokens))
        log_p_tV = tempered(raised(logits.rows(span)), temperature).log_softmax(-1)
        yield log_p_tV, response_ids_T[span], None if student_ids_TM is None else student_ids_TM[span]


def _top_k(
    log_p_tV: torch.Tensor, ids_t: torch.Tensor, student_tM: torch.Tensor | None, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids [t, C], log-probabilities [t, C], tail [t] and sampled [t] of a chunk."""
    sampled_t1 = ids_t.unsqueeze(-1)
    chosen = [log_p_tV.topk(min(k, log_p_tV.shape[-1]), dim=-1).indices, sampled_t1]
    if student_tM is not None:
        chosen.append(student_tM.masked_fill(student_tM >= log_p_tV.shape[-1], -1))
    ids_tC, _ = torch.cat(chosen, dim=-1).sort(dim=-1)
    none_tC = ids_tC < 0
    none_tC[:, 1:] |= ids_tC[:, 1:] == ids_tC[:, :-1]
    rows_tC = torch.where(none_tC, sampled_t1, ids_tC)
    logprobs_tC = log_p_tV.gather(-1, rows_tC)
    # Summed over the rows that are left: 1 - (the sum of the others) would lose a small tail to rounding.
    tail_t = log_p_tV.scatter(-1, rows_tC, -torch.inf).logsumexp(-1)
    return (
        ids_tC.masked_fill(none_tC, -1).int(),
        logprobs_tC.masked_fill(none_tC, -torch.inf),
        tail_t,
        log_p_tV.gather(-1, sampled_t1).squeeze(-1),
    )
