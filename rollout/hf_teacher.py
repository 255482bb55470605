"""A teacher that runs on transformers: exact over the shared vocabulary, in every form of signal."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gkd.arrays import to_array
from gkd.head import HeadWeights
from gkd.logits import HeadLogits, Logits, WholeLogits
from gkd.model_loading import load_causal_lm
from gkd.packing import PackedRows, pack
from gkd.response_forward import ResponseForward
from gkd.signals import FullLogits, HiddenStates, SignalKind, TeacherSignal
from gkd.sparse import sampled_signal, top_k_signal
from gkd.types import Rollout
from rollout.signal_store import CacheSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherSettings:
    """Everything a teacher worker needs to know."""

    name: str = "teacher"
    """Its name where there are several."""
    model: str
    """Folder or hub name."""
    dtype: str
    """Precision it runs in."""
    rows: int
    """Vocabulary rows it shares with the student."""
    signal: SignalKind = SignalKind.FULL_LOGITS
    """What it sends."""
    top_k: int = 0
    """Of a sparse signal: its own most probable tokens."""
    temperature: float = 1.0
    """Of the loss: sparse signals are made at it."""
    cache: CacheSettings | None = None
    """Where signals of given text are kept; None: nowhere."""


class HfTeacher:
    """Scores the very tokens of a rollout; eval mode, no gradient."""

    def __init__(self, settings: TeacherSettings) -> None:
        """Load the model.

        Raises:
            ValueError: if hidden states are asked for and the model's head cannot be applied on its own.
        """
        self._settings = settings
        self._model = load_causal_lm(settings.model, dtype=settings.dtype, init="pretrained")
        self._forward = ResponseForward(self._model)
        if settings.signal is SignalKind.HIDDEN_STATES and not self._forward.has_own_head:
            raise ValueError(
                f"the logits of {settings.model} are more than its head and a softcap of its last hidden states: set "
                "teacher.signal to full_logits"
            )

    def head(self) -> HeadWeights:
        """What turns this teacher's hidden states into logits."""
        return HeadWeights.of(self._model, rows=self._settings.rows)

    @torch.inference_mode()
    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherSignal]:
        """Signals of one group, scored in one batch: one for each rollout's response, in order."""
        packed = pack(
            [r.scored_prompt_ids for r in rollouts],
            [r.response_ids for r in rollouts],
            share_rows=self._forward.share_rows,
        )
        lengths = list(packed.response_lengths)
        match self._settings.signal:
            case SignalKind.FULL_LOGITS:
                logits_TV = self._forward(packed)[:, : self._settings.rows]
                return [FullLogits.from_tensor(part) for part in logits_TV.split(lengths)]
            case SignalKind.HIDDEN_STATES:
                parts = self._forward.hidden(packed).split(lengths)
                return [HiddenStates(to_array(part), self._settings.name) for part in parts]
            case kind:
                return self._sparse(kind, packed, rollouts)

    def _sparse(self, kind: SignalKind, packed: PackedRows, rollouts: Sequence[Rollout]) -> list[TeacherSignal]:
        ids = packed.response_ids_T.split(list(packed.response_lengths))
        signals: list[TeacherSignal] = []
        for logits, ids_T, rollout in zip(self._logits(packed), ids, rollouts, strict=True):
            ids_T = ids_T.to(logits.device)
            if kind is SignalKind.SAMPLED_LOGPROBS:
                signals.append(sampled_signal(logits, ids_T, temperature=self._settings.temperature))
                continue
            student = rollout.top_ids
            signals.append(
                top_k_signal(
                    logits,
                    ids_T,
                    k=self._settings.top_k,
                    temperature=self._settings.temperature,
                    student_ids_TM=None if student is None else torch.from_numpy(student).long().to(logits.device),
                )
            )
        return signals

    def _logits(self, packed: PackedRows) -> list[Logits]:
        """Of each sequence; made a few tokens at a time where the head can be applied on its own."""
        lengths, rows = list(packed.response_lengths), self._settings.rows
        if not self._forward.has_own_head:
            return [WholeLogits(part) for part in self._forward(packed)[:, :rows].split(lengths)]
        parts = self._forward.hidden(packed).split(lengths)
        return [HeadLogits(part, self._forward.head, num_rows=rows) for part in parts]
