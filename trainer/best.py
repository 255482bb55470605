"""Which checkpoint was the best so far, by a metric of the evaluations."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_LARGER_IS_BETTER = {"exact_match": True, "divergence": False, "cross_entropy": False}


@dataclass(slots=True)
class Best:
    """The best evaluated step. Its state travels in every checkpoint, so that a resumed run goes on comparing."""

    metric: str | None
    """One of `eval.metrics`; None compares nothing."""
    step: int | None = None
    """The best step so far."""
    value: float | None = None
    """Its metric."""

    def update(self, step: int, metrics: Mapping[str, Any]) -> bool:
        """Whether this step is the best so far, by its `eval/` metrics; it is then remembered."""
        value = metrics.get(f"eval/{self.metric}")
        if self.metric is None or value is None or not math.isfinite(value):
            return False
        sign = 1 if _LARGER_IS_BETTER[self.metric] else -1
        if self.value is not None and sign * value <= sign * self.value:
            return False
        self.step, self.value = step, value
        return True

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"metric": self.metric, "step": self.step, "value": self.value}

    @classmethod
    def resumed(cls, metric: str | None, state: Mapping[str, Any]) -> "Best":
        """Go on from a checkpoint's state; another metric than before starts anew."""
        return cls(**state) if state.get("metric") == metric and metric else cls(metric)
