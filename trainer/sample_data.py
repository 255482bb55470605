"""What goes with each sample into an objective, and what a step finds out about each.

Legend: N sequences, T packed response tokens of a micro-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch

from gkd.objectives.base import Chunk, ObjectiveOutput
from gkd.types import ScoredRollout


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleReport:
    """What a step found out about one sample."""

    loss: float
    """Sum of the objective's loss over its counted tokens."""
    num_tokens: int
    """Counted tokens."""
    logprobs_T: np.ndarray
    """[T] float32 log-probabilities of the response's tokens under the weights that the step began with, at temperature
    1; NaN where the objective made no logits."""


class SampleInputs(TypedDict):
    """Those fields of `ObjectiveInputs` that travel with the samples."""

    sampler_logprobs_T: torch.Tensor | None
    rewards_N: torch.Tensor | None
    advantages_N: torch.Tensor | None
    sequence_scale_N: torch.Tensor


def sample_inputs(
    samples: Sequence[ScoredRollout], sequence_scales: Sequence[float], device: torch.device
) -> SampleInputs:
    """What the samples of a micro-batch bring along.

    Args:
        samples: in the order of the micro-batch.
        sequence_scales: of each (`gkd.reduce`).
        device: of the student.
    """

    def per_sequence(values: Sequence[float | None]) -> torch.Tensor | None:
        known = [value for value in values if value is not None]
        assert len(known) in (0, len(values)), "either every sample of a batch has one or none has"
        return torch.tensor(known, dtype=torch.float32, device=device) if known else None

    return {
        "sampler_logprobs_T": _sampler_logprobs(samples, device),
        "rewards_N": per_sequence([sample.reward for sample in samples]),
        "advantages_N": per_sequence([sample.advantage for sample in samples]),
        "sequence_scale_N": torch.tensor(sequence_scales, dtype=torch.float32, device=device),
    }


def _sampler_logprobs(samples: Sequence[ScoredRollout], device: torch.device) -> torch.Tensor | None:
    """[T], 0 for the dataset's sequences; None if no sequence has any."""
    rollouts = [sample.rollout for sample in samples]
    if all(rollout.logprobs is None for rollout in rollouts):
        return None
    parts = [rollout.logprobs or (0.0,) * len(rollout.response_ids) for rollout in rollouts]
    return torch.tensor([value for part in parts for value in part], dtype=torch.float32, device=device)


class LogprobWatch:
    """Notes the log-probability of every response token while an objective has the logits at hand.

    Costs one pass over them, forward only, and keeps [T]. They are normalised over the V rows of the loss, and those
    that an engine records over all rows of its head: the same but for the mass on rows that are no tokens.
    """

    def __init__(self, num_tokens: int) -> None:
        """`num_tokens` is T."""
        self._num_tokens = num_tokens
        self._logprobs_T: torch.Tensor | None = None
        self._noted: set[int] = set()

    @torch.no_grad()
    def __call__(self, chunk: Chunk) -> None:
        """Note those of a chunk; when the backward pass makes it again there is nothing to do."""
        if chunk.span.start in self._noted:
            return
        self._noted.add(chunk.span.start)
        if self._logprobs_T is None:
            self._logprobs_T = torch.full((self._num_tokens,), torch.nan, device=chunk.student_tV.device)
        chosen_t = chunk.student_tV.gather(-1, chunk.ids_t.unsqueeze(-1)).squeeze(-1)
        self._logprobs_T[chunk.span] = (chosen_t - chunk.student_tV.logsumexp(-1)).float()

    def reports(self, output: ObjectiveOutput, lengths: Sequence[int]) -> list[SampleReport]:
        """One per sequence of a micro-batch whose objective has run; `lengths` are their response tokens."""
        missing_T = torch.full((self._num_tokens,), torch.nan)
        noted_T = (missing_T if self._logprobs_T is None else self._logprobs_T).cpu().numpy()
        mask_T = output.mask_T.cpu()
        loss_T = torch.where(output.mask_T, output.loss_T.detach(), 0).cpu()
        ends = np.cumsum(lengths)
        return [
            SampleReport(
                loss=float(loss_T[end - length : end].double().sum()),
                num_tokens=int(mask_T[end - length : end].sum()),
                logprobs_T=noted_T[end - length : end],
            )
            for end, length in zip(ends, lengths, strict=True)
        ]
