"""What an objective sees and returns.

Legend: N sequences, T packed response tokens of a micro-batch, t tokens of a chunk, V shared vocabulary rows, H hidden
width, W outcomes (V, or K + 1 of a sparse teacher signal).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from gkd.logits import Logits, map_chunks
from gkd.signals import SignalKind
from gkd.teacher_view import TeacherView, raised


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some of the tokens, with their logits."""

    student_tV: torch.Tensor
    """[t, V] float32 logits of the student at temperature 1, with a graph."""
    ids_t: torch.Tensor
    """[t] int64, the token that follows each position."""
    span: slice
    """Which of the T tokens they are."""
    teacher: TeacherView | None
    """The teacher; None if the objective requires none."""

    def pair(self, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Student and teacher over the same outcomes, as logits [t, W] at a loss temperature: what divergences take.

        Raises:
            ValueError: if there is no teacher, or its signal holds no distribution at this temperature.
        """
        if self.teacher is None:
            raise ValueError("this objective compares with a teacher, and there is no teacher signal")
        return self.teacher.pair(self.student_tV, self.span, temperature=temperature)

    def student_logprobs(self, temperature: float) -> torch.Tensor:
        """[t] log-probabilities of the response's tokens under the student."""
        log_p_tV = (self.student_tV / temperature).log_softmax(-1)
        return log_p_tV.gather(-1, self.ids_t.unsqueeze(-1)).squeeze(-1)

    def teacher_logprobs(self, temperature: float) -> torch.Tensor:
        """[t] log-probabilities of the response's tokens under the teacher, without a graph.

        Raises:
            ValueError: if there is no teacher, or its signal was made at another temperature.
        """
        if self.teacher is None:
            raise ValueError("this objective compares with a teacher, and there is no teacher signal")
        return self.teacher.sampled_logprobs(self.ids_t, self.span, temperature=temperature)


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveInputs:
    """One micro-batch of response tokens, packed end to end.

    Logits are made when they are asked for: `per_token` does so a few tokens at a time, forward and backward, so that
    no [T, V] tensor of the whole micro-batch exists. `student_logits_TV` makes them all.
    """

    student: Logits
    """Logits of the student at temperature 1, with a graph."""
    num_rows: int
    """V."""
    teacher: TeacherView | None
    """The teacher's signal, without a graph; None if the objective requires no teacher."""
    response_ids_T: torch.Tensor
    """[T] int64, the token that follows each position."""
    mask_T: torch.Tensor
    """[T] bool, which tokens count."""
    lengths: tuple[int, ...]
    """Response tokens of each of the N sequences; their sum is T."""
    on_policy_N: torch.Tensor
    """[N] bool, which sequences the student wrote itself."""
    student_hidden_TH: torch.Tensor | None = None
    """[T, H] last hidden states of the student, with a graph; None where its head cannot be applied on its own."""
    sampler_logprobs_T: torch.Tensor | None = None
    """[T] float32 log-probabilities of the response's tokens when they were sampled, at temperature 1, without a graph;
    0 in sequences of the dataset; None where they were not recorded."""
    rewards_N: torch.Tensor | None = None
    """[N] float32 reward of each sequence; None where there is no reward function."""

    @property
    def student_logits_TV(self) -> torch.Tensor:
        """[T, V] float32 logits of the student, all at once."""
        return raised(self.student.rows(slice(0, self.student.num_tokens)))

    def per_token(self, function: Callable[[Chunk], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
        """Apply a function to all tokens, chunk by chunk.

        The function is called again in the backward pass: what is random in it has to be drawn before.

        Args:
            function: from a chunk to tensors [t, ...].

        Returns:
            For each tensor of the function, [T, ...], with a graph.
        """

        def of(span: slice) -> tuple[torch.Tensor, ...]:
            return function(Chunk(raised(self.student.rows(span)), self.response_ids_T[span], span, self.teacher))

        tokens = self.student.num_tokens
        return map_chunks(of, num_tokens=tokens, num_rows=self.num_rows, device=self.student.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveOutput:
    """Per-token results; masking, counting and averaging happen in `gkd.reduce` alone."""

    loss_T: torch.Tensor
    """[T] loss per token, with a graph."""
    mask_T: torch.Tensor
    """[T] bool, which tokens this objective counts: the inputs' mask or a part of it."""
    metrics_T: dict[str, torch.Tensor] = field(default_factory=dict)
    """Name -> [T] detached values, averaged over the counted tokens of the whole batch and logged as `loss/<name>`."""


class Objective(Protocol):
    """What the trainer minimises."""

    requires: frozenset[SignalKind]
    """Signal kinds, one of which the teacher must provide; empty if no teacher is needed."""

    def __call__(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        """The per-token loss of one micro-batch."""
        ...
