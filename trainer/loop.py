"""The training loop. Everything it calls was chosen when the run was built."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gkd.errors import Interrupted
from trainer import checkpoint
from trainer.metrics import step_metrics
from trainer.records import Records
from trainer.weight_sync import SyncReport


class Sync(Protocol):
    """Brings the rollout engines to a version."""

    def push(self, version: int) -> SyncReport:
        """Publish and prove."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What the loop works with."""

    pipeline: Any
    """Context manager with `release(version)` and `take() -> ScoredBatch`."""
    learner: Any
    """The training ranks: `step`, `save`, `load`, `export`."""
    sync: Sync
    """Weights to the engines."""
    records: Records
    """Files of the run."""
    report: Callable[[dict[str, Any]], None]
    """Shows a step's metrics while the run goes on."""
    stop_requested: Callable[[], bool]
    """Whether the user asked to stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Which steps to run, and where their checkpoints go."""

    completed_steps: int
    """Steps done before; the first one run is the next."""
    max_steps: int
    """Last step."""
    checkpoint_every: int
    """Steps between checkpoints; 0 saves at the end only."""
    keep_last: int
    """Checkpoints kept."""
    checkpoints: Path
    """Their folder."""
    state: dict[str, Any]
    """Written into each checkpoint."""

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint is due after this step."""
        return step == self.max_steps or (self.checkpoint_every > 0 and step % self.checkpoint_every == 0)


def train(parts: Parts, span: Span) -> None:
    """Run the steps of the span.

    Raises:
        Interrupted: after a checkpoint, if the user asked to stop.
    """
    with parts.records as records, parts.pipeline as pipeline:
        parts.sync.push(version=span.completed_steps)
        pipeline.release(span.completed_steps)
        for step in range(span.completed_steps + 1, span.max_steps + 1):
            started = time.perf_counter()
            batch = pipeline.take()
            taken = time.perf_counter()
            trained = parts.learner.step(step, batch.rollouts, batch.groups, batch.signals)
            train_s = time.perf_counter() - taken
            synced = parts.sync.push(version=step)
            pipeline.release(step)
            step_s = time.perf_counter() - started
            metrics = step_metrics(batch, trained, synced, wait_s=taken - started, train_s=train_s, step_s=step_s)
            records.write(step, metrics, batch.rollouts)
            parts.report(metrics)
            stop = parts.stop_requested()
            if stop or span.saves_at(step):
                records.flush_to_disk()  # a checkpoint must never know more than the ledger
                checkpoint.write(span.checkpoints, step, span.state, parts.learner.save, keep_last=span.keep_last)
            if stop and step < span.max_steps:
                raise Interrupted(f"stopped after step {step}; a checkpoint is saved")
