"""The numbers of one step, under the names of `metrics.jsonl`."""

from typing import Any

from gkd.interfaces import ScoredBatch
from trainer.step import StepReport
from trainer.weight_sync import SyncReport


def step_metrics(
    batch: ScoredBatch, trained: StepReport, synced: SyncReport, *, wait_s: float, train_s: float, step_s: float
) -> dict[str, Any]:
    """One line of `metrics.jsonl`.

    Args:
        batch: what was trained on.
        trained: of the optimizer step.
        synced: of the weight sync after it.
        wait_s: how long the trainer waited for the batch.
        train_s: how long the optimizer step took.
        step_s: how long the whole step took.
    """
    written = [rollout for rollout in batch.rollouts if rollout.source == "student"]
    generated = sum(len(rollout.response_ids) for rollout in written)
    ages = [batch.step - 1 - rollout.versions[0] for rollout in written if rollout.versions]
    stopped = sum(rollout.stop_reason == "stop" for rollout in written)
    return {
        "step": batch.step,
        "loss/total": trained.loss,
        **{f"loss/{name}": value for name, value in trained.metrics.items()},
        "train/grad_norm": trained.grad_norm,
        "train/learning_rate": trained.learning_rate,
        "train/micro_batches": trained.num_micro_batches,
        "weights/version": synced.version,
        "sync/seconds": synced.seconds,
        "sync/bytes": synced.num_bytes,
        "sync/logprob_gap_max": synced.logprob_gap_max,
        "staleness/max": max(ages, default=0),
        "tokens/generated": generated,
        "tokens/trained": trained.num_tokens,
        "rollout/mean_length": generated / len(written) if written else None,
        "rollout/stopped_fraction": stopped / len(written) if written else None,
        "teacher/signal_bytes": batch.signal_bytes,
        "time/rollout_s": batch.rollout_s,
        "time/teacher_s": batch.teacher_s,
        "time/train_s": train_s,
        "time/train_wait_s": wait_s,
        "time/step_s": step_s,
        "source/on_policy": len(written) / len(batch.rollouts),
    }
