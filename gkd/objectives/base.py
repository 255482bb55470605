"""What an objective sees and returns. Legend: T packed response tokens of a micro-batch, V shared vocabulary rows."""

from dataclasses import dataclass, field
from typing import Protocol

import torch

from gkd.signals import SignalKind


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveInputs:
    """One micro-batch of response tokens, packed end to end."""

    student_logits_TV: torch.Tensor
    """[T, V] logits of the student at temperature 1, with a graph."""
    teacher_logits_TV: torch.Tensor | None
    """[T, V] full teacher logits at temperature 1, without a graph; None if the objective requires no teacher."""
    response_ids_T: torch.Tensor
    """[T] int64, the token that follows each position."""
    mask_T: torch.Tensor
    """[T] bool, which tokens count."""


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
