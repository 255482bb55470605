"""The training loop. Everything it calls was chosen when the run was built."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gkd.errors import Interrupted
from gkd.trace import Lane
from trainer import checkpoint
from trainer.best import Best
from trainer.metrics import step_metrics
from trainer.records import Records
from trainer.weight_sync import BackgroundPush, Sync


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What the loop works with."""

    pipeline: Any
    """Context manager with `release(version)`, `fail(error)` and `take()`: a `ScoredBatch`, or None to stop."""
    learner: Any
    """The training ranks: `step`, `save`, `load`, `export`."""
    sync: Sync
    """Weights to the engines."""
    evaluate: Callable[[int], dict[str, float]]
    """The `eval/` metrics after a step; nothing where none are due."""
    records: Records
    """Files of the run."""
    report: Callable[[dict[str, Any]], None]
    """Shows a step's metrics while the run goes on."""
    lane: Lane
    """Measures the loop, and records it where a timeline is asked for."""


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
    best: Best
    """The best evaluated step so far; its checkpoint is kept as well."""
    state: dict[str, Any]
    """Written into each checkpoint."""

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint is due after this step."""
        return step == self.max_steps or (self.checkpoint_every > 0 and step % self.checkpoint_every == 0)


def train(parts: Parts, span: Span) -> None:
    """Run the steps of the span.

    While a version is on its way to the engines, the next batch is generated and scored as far as the staleness bound
    lets it; the weights do not change before their proof is done.

    Raises:
        Interrupted: after a checkpoint, if the user asked to stop.
    """
    if span.completed_steps >= span.max_steps:
        return
    with parts.records as records, parts.pipeline as pipeline:
        with parts.lane.span("wait", step=span.completed_steps):
            parts.sync.push(span.completed_steps, pipeline.release)
            batch = pipeline.take()
        for step in range(span.completed_steps + 1, span.max_steps + 1):
            if batch is None:
                saved = "; a checkpoint is saved" if step > 1 else ""
                raise Interrupted(f"stopped after step {step - 1}{saved}")
            with parts.lane.span("train", step=step) as training:
                trained = parts.learner.step(step, batch.rollouts, batch.groups, batch.signals, batch.rewards)
            batch = batch.without_signals()
            push = BackgroundPush(parts.sync, step, served=pipeline.release, failed=pipeline.fail)
            with parts.lane.span("wait", step=step) as waiting, push:
                following = pipeline.take() if step < span.max_steps else None
            stops = following is None
            metrics = step_metrics(batch, trained, push.report, train_s=training.seconds, wait_s=waiting.seconds)
            metrics |= parts.evaluate(step) if not stops or step == span.max_steps else {}
            records.write(step, metrics, batch.rollouts, batch.rewards)
            parts.report(metrics)
            if span.best.update(step, metrics) or stops or span.saves_at(step):
                records.flush_to_disk()  # a checkpoint must never know more than the ledger
                with parts.lane.span("checkpoint", step=step):
                    checkpoint.write(
                        span.checkpoints,
                        step,
                        span.state | {"best": span.best.state()},
                        parts.learner.save,
                        keep_last=span.keep_last,
                        keep_step=span.best.step,
                    )
            batch = following
