"""What an objective sees and returns.

Legend: N sequences, T packed response tokens of a micro-batch, t tokens of a chunk, V shared vocabulary rows, H hidden
width, W outcomes (V, or K + 1 of a sparse teacher signal).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeGuard

import torch

from gkd.head_linear import LinearHead
from gkd.logits import HeadLogits, Logits, chunk_spans, map_chunks, raised, tempered
from gkd.one_pass import in_one_pass
from gkd.signals import SignalKind
from gkd.teacher_view import TeacherView


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
        log_p_tV = tempered(self.student_tV, temperature).log_softmax(-1)
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
    loss_weights_T: torch.Tensor | None = None
    """[T] float32, what each token's loss is going to be multiplied by, but for a common factor, in the batch's loss; 0
    where it does not count. Nothing but time hangs on it (`loss_per_token`); None where it is not known."""
    student_hidden_TH: torch.Tensor | None = None
    """[T, H] last hidden states of the student, with a graph; None where its head cannot be applied on its own."""
    sampler_logprobs_T: torch.Tensor | None = None
    """[T] float32 log-probabilities of the response's tokens when they were sampled, at temperature 1, without a graph;
    0 in sequences of the dataset; None where they were not recorded."""
    rewards_N: torch.Tensor | None = None
    """[N] float32 reward of each sequence; None where there is no reward function."""
    advantages_N: torch.Tensor | None = None
    """[N] float32 reward minus baseline (`gkd.advantages`) of each sequence, 0 for the dataset's; None where there is
    no reward function."""
    sequence_scale_N: torch.Tensor | None = None
    """[N] float32: a loss per token times this is what the reducer makes a sum over a sequence's tokens, averaged over
    the sequences of the whole batch that the student wrote (`gkd.reduce.sequence_sum_scales`); 0 for the dataset's."""
    watch: Callable[[Chunk], None] | None = None
    """Sees every chunk that `per_token` makes, to measure what needs its logits."""

    @property
    def on_policy_T(self) -> torch.Tensor:
        """[T] bool, which tokens the student wrote itself."""
        return self.on_policy_N.repeat_interleave(torch.tensor(self.lengths, device=self.on_policy_N.device))

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
            return function(self._chunk(span, self.student.rows(span)))

        tokens = self.student.num_tokens
        return map_chunks(of, num_tokens=tokens, num_rows=self.num_rows, device=self.student.device)

    def loss_per_token(self, function: Callable[[Chunk], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
        """`per_token` for a function whose first result is the loss and whose others have no graph.

        Where `loss_weights_T` is known, gradients are made with the loss, and no logits are made a second time
        (`gkd.one_pass`).

        Args:
            function: from a chunk to tensors [t, ...]; the first depends on the chunk's logits alone.

        Returns:
            For each tensor of the function, [T, ...]; the first with a graph.
        """
        spans = chunk_spans(self.student.num_tokens, self.num_rows, self.student.device.type)
        logits, weights_T = self.student, self.loss_weights_T
        if len(spans) == 1 or weights_T is None or not torch.is_grad_enabled() or not _can_stand_apart(logits):
            return self.per_token(function)
        return in_one_pass(logits, weights_T, spans, lambda span, rows_tV: function(self._chunk(span, rows_tV)))

    def _chunk(self, span: slice, student_tV: torch.Tensor) -> Chunk:
        chunk = Chunk(raised(student_tV), self.response_ids_T[span], span, self.teacher)
        if self.watch is not None:
            self.watch(chunk)
        return chunk


def _can_stand_apart(logits: Logits) -> TypeGuard[HeadLogits]:
    return isinstance(logits, HeadLogits) and isinstance(logits.head, LinearHead) and logits.head.can_stand_apart


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveOutput:
    """Per-token results; masking, counting and averaging happen in `gkd.reduce` alone."""

    loss_T: torch.Tensor
    """[T] loss per token, with a graph."""
    mask_T: torch.Tensor
    """[T] bool, which tokens this objective counts: the inputs' mask or a part of it."""
    metrics_T: dict[str, torch.Tensor] = field(default_factory=dict)
    """Name -> [T] detached values, averaged over the counted tokens of the whole batch and logged as `loss/<name>`;
    left out of steps that have none. The names are the same for every micro-batch."""
    partial_metrics_T: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """Name -> [T] detached values and [T] bool: likewise, but of these tokens alone."""


Staleness = Literal["robust", "corrected", "sensitive"]
"""What samples of an older student do to an objective. `robust`: every term is computed anew under the current student,
and only the choice of prefixes is old. `corrected`: the tokens are actions, weighted by how much more probable they are
now (this needs their recorded log-probabilities). `sensitive`: they are taken as if the current student had written
them, and the gradient is biased."""


class Objective(Protocol):
    """What the trainer minimises."""

    requires: frozenset[SignalKind]
    """Signal kinds, one of which the teacher must provide; empty if no teacher is needed."""
    staleness: Staleness
    """What samples of an older student do to it."""
    needs_sampler_logprobs: bool
    """Whether the rollout engines must record the log-probabilities of the tokens that they sample."""

    def __call__(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        """The per-token loss of one micro-batch."""
        ...


class Adversary(Protocol):
    """Parameters that an objective owns, and what they learn before every step of the student.

    They live beside the student, whole on every rank, and learn from the whole batch at once with AdamW.
    """

    learning_rate_multiplier: float
    """Their learning rate, in multiples of the student's."""
    weight_decay: float
    """Decoupled."""
    grad_clip: float
    """Largest gradient norm, of all of them together."""

    def prepare(self, inputs: ObjectiveInputs, *, seed: int) -> None:
        """Make the parameters if there are none yet: their shapes follow from what the models give."""
        ...

    def parameters(self) -> list[torch.nn.Parameter]:
        """All of them, in an order that does not change."""
        ...

    def loss(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        """What they minimise: per token, weighted and reduced like the student's loss. The inputs have no graph."""
        ...

    def inner_steps(self, step: int) -> int:
        """How often they learn before the student's step `step`, from 1: at least once."""
        ...

    def end_step(self, metrics: Mapping[str, float]) -> None:
        """They have learnt for this step; `metrics` are those of the last `loss`, of the whole batch."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything to go on from, as tensors and plain values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any], *, device: torch.device) -> None:
        """Go on from what `state_dict` gave; makes the parameters."""
        ...


def adversaries_of(objective: Objective) -> list[Adversary]:
    """What the objective owns: its `adversaries` where it says which, or else those of its `terms`; most have none."""
    own = getattr(objective, "adversaries", None)
    if own is not None:
        return list(own)
    return [adversary for term in getattr(objective, "terms", ()) for adversary in adversaries_of(term)]
