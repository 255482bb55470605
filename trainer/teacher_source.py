"""Where a training rank's teacher signals come from: teacher workers, or the student with other weights."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from gkd.head import Head, HeadWeights
from gkd.logits import HeadLogits, Logits, WholeLogits
from gkd.packing import pack
from gkd.response_forward import ResponseForward
from gkd.teacher_view import TeacherView, WholeView, view_of
from gkd.types import ScoredRollout


class TeacherSource(Protocol):
    """Gives the teacher's view of a micro-batch."""

    def view(self, samples: Sequence[ScoredRollout]) -> TeacherView | None:
        """What the teacher says of the samples' responses, end to end; None where no teacher was asked."""
        ...


class SentSignals:
    """Signals that teacher workers sent along with the samples."""

    def __init__(self, *, rows: int, device: torch.device) -> None:
        self._rows = rows
        self._device = device
        self._heads: dict[str, Head] = {}

    def take_heads(self, heads: Mapping[str, HeadWeights]) -> None:
        """The heads of the teachers that send hidden states, by name."""
        self._heads = {name: head.on(self._device) for name, head in heads.items()}

    def view(self, samples: Sequence[ScoredRollout]) -> TeacherView | None:
        """Of the samples' own signals."""
        signals = [sample.signal for sample in samples if sample.signal is not None]
        if not signals:
            return None
        assert len(signals) == len(samples), "either every sample of a batch is scored or none is"
        return view_of(signals, self._heads, rows=self._rows, device=self._device)


class StudentAsTeacher:
    """The student itself with other weights, such as its base with the adapter off: self-distillation."""

    def __init__(
        self,
        model: Any,
        forward: ResponseForward,
        as_teacher: Callable[[], AbstractContextManager[None]],
        *,
        rows: int,
    ) -> None:
        """Set up.

        Args:
            model: the student, with its adapter if it has one.
            forward: runs it.
            as_teacher: within it the model has the teacher's weights.
            rows: vocabulary rows in the loss.
        """
        self._model = model
        self._forward = forward
        self._as_teacher = as_teacher
        self._rows = rows

    @torch.no_grad()
    def view(self, samples: Sequence[ScoredRollout]) -> TeacherView:
        """Of the teacher's weights, without dropout."""
        packed = pack(
            [s.rollout.scored_prompt_ids for s in samples],
            [s.rollout.response_ids for s in samples],
            share_rows=self._forward.share_rows,
        )
        was_training = {module: module.training for module in self._model.modules()}
        self._model.eval()
        with self._as_teacher():
            logits: Logits
            if self._forward.has_own_head:
                logits = HeadLogits(self._forward.hidden(packed), self._head, num_rows=self._rows)
            else:
                logits = WholeLogits(self._forward(packed)[:, : self._rows])
        for module, training in was_training.items():
            module.training = training
        return WholeView(logits)

    def _head(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), self._as_teacher():
            return self._forward.head(hidden_TH)
