"""Ray around a student that is only measured, not trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from gkd.config.divergence import DivergenceConfig
from gkd.evaluation import divergence_sum
from gkd.model_loading import load_causal_lm
from gkd.objectives import build_divergence
from gkd.response_forward import ResponseForward
from gkd.teacher_view import view_of
from gkd.types import Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSettings:
    """What is measured."""

    model: str
    """Folder or hub name of the student."""
    divergence: DivergenceConfig
    """The divergence to the teacher."""
    rows: int
    """Vocabulary rows that both share."""


@ray.remote
class EvaluationActor:
    """Holds a student in eval mode."""

    def __init__(self, settings: EvaluationSettings) -> None:
        self._forward = ResponseForward(load_causal_lm(settings.model, dtype="float32", init="pretrained"))
        self._divergence = build_divergence(settings.divergence)
        self._rows = settings.rows

    def ready(self) -> bool:
        """Returns once the model is loaded."""
        return True

    def divergence(self, rollouts: Sequence[Rollout], signals: Any) -> tuple[float, int]:
        """Sum over response tokens, and their number."""
        view = view_of(signals, {}, rows=self._rows, device=self._forward.device)
        return divergence_sum(self._forward, rollouts, view, self._divergence, rows=self._rows)
