"""A teacher that runs on transformers and gives exact logits over the shared vocabulary."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gkd.model_loading import load_causal_lm
from gkd.packing import pack
from gkd.response_forward import ResponseForward
from gkd.signals import FullLogits, SignalKind, TeacherSignal
from gkd.types import Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherSettings:
    """Everything a teacher worker needs to know."""

    model: str
    """Folder or hub name."""
    dtype: str
    """Precision it runs in."""
    rows: int
    """Vocabulary rows it shares with the student."""


class HfTeacher:
    """Scores the very tokens of a rollout; eval mode, no gradient."""

    provides = frozenset({SignalKind.FULL_LOGITS})

    def __init__(self, settings: TeacherSettings) -> None:
        self._rows = settings.rows
        self._forward = ResponseForward(load_causal_lm(settings.model, dtype=settings.dtype, init="pretrained"))

    @torch.inference_mode()
    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherSignal]:
        """Signals of one group, scored in one batch: [T, V] logits of each rollout's response, in order."""
        packed = pack(
            [r.prompt_ids for r in rollouts],
            [r.response_ids for r in rollouts],
            share_rows=self._forward.share_rows,
        )
        logits_TV = self._forward(packed)[:, : self._rows]
        return [FullLogits.from_tensor(part) for part in logits_TV.split(list(packed.response_lengths))]
