"""Weights from the trainer to the rollout engines, and the proof that the engines serve what was trained."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from gkd.interfaces import WeightBuckets, WeightReceivers
from gkd.types import Rollout


class WeightGapError(RuntimeError):
    """The rollout engine does not serve the trained weights."""


class Publisher(Protocol):
    """The trainer, as the weight sync sees it."""

    def publish(self, version: int) -> WeightBuckets:
        """The current weights, packed."""
        ...

    def logprobs(self, rollouts: Sequence[Rollout]) -> list[list[float]]:
        """Log-probabilities of responses under the current weights."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """What one sync measured."""

    version: int
    """The version that is now current."""
    seconds: float
    """From reading the weights to the end of the proof."""
    num_bytes: int
    """Bytes of weights that travelled."""
    logprob_gap_max: float | None
    """Largest |log p(engine) - log p(trainer)| on the probe, in nats; None where no engine runs."""


class WeightSync:
    """Publishes a version and proves it: after every sync the engine generates a probe that the trainer scores."""

    def __init__(self, trainer: Publisher, engines: WeightReceivers, *, max_gap: float | None) -> None:
        """A gap above `max_gap` nats ends the run; None only measures."""
        self._trainer = trainer
        self._engines = engines
        self._max_gap = max_gap

    def push(self, version: int) -> SyncReport:
        """Bring every engine to the current weights.

        Raises:
            WeightGapError: if the engine's log-probabilities are not the trainer's.
        """
        start = time.perf_counter()
        weights = self._trainer.publish(version)
        self._engines.update_weights(weights)
        gap = self._measure_gap()
        if self._max_gap is not None and not gap <= self._max_gap:
            raise WeightGapError(
                f"after the sync of version {version} the rollout engine's log-probabilities differ from the "
                f"trainer's by up to {gap:.3g} nats (sync.max_logprob_gap = {self._max_gap:g}): rollouts would not "
                "come from the weights they claim. Usual causes: a weight that the engine did not take over (a tied "
                "head, a renamed tensor), or a precision that differs between the two."
            )
        return SyncReport(
            version=version,
            seconds=time.perf_counter() - start,
            num_bytes=weights.num_bytes,
            logprob_gap_max=gap,
        )

    def _measure_gap(self) -> float:
        probe = self._engines.probe()
        trained = self._trainer.logprobs(probe)
        gap = 0.0
        for rollout, logprobs in zip(probe, trained, strict=True):
            assert rollout.logprobs is not None and len(rollout.logprobs) == len(logprobs) > 0
            for served, own in zip(rollout.logprobs, logprobs, strict=True):
                difference = abs(served - own)
                gap = math.inf if math.isnan(difference) else max(gap, difference)
        return gap


class NoSync:
    """In the sync's place where no rollout engine runs."""

    def push(self, version: int) -> SyncReport:
        """The version advances; nothing moves."""
        return SyncReport(version=version, seconds=0.0, num_bytes=0, logprob_gap_max=None)
