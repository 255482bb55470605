"""The numbers of one step, under the names of `metrics.jsonl`."""

from statistics import fmean, pstdev
from typing import Any

from gkd.interfaces import ScoredBatch
from trainer.staleness import staleness_metrics
from trainer.step import StepReport
from trainer.weight_sync import SyncReport


def step_metrics(
    batch: ScoredBatch, trained: StepReport, synced: SyncReport, *, train_s: float, wait_s: float
) -> dict[str, Any]:
    """One line of `metrics.jsonl`.

    Args:
        batch: what was trained on.
        trained: of the optimizer step.
        synced: of the weight sync after it.
        train_s: how long the optimizer step took.
        wait_s: how long the trainer then waited for the sync and for the next batch.
    """
    own = sum(rollout.source == "student" for rollout in batch.rollouts)
    written = [rollout for rollout in batch.rollouts if rollout.source != "dataset"]
    generated = sum(len(rollout.response_ids) for rollout in written)
    ages = [batch.step - 1 - rollout.versions[0] for rollout in written if rollout.versions]
    read = [rollout.scored_prompt_ids if rollout.source == "teacher" else rollout.prompt_ids for rollout in written]
    prompt_tokens = sum(map(len, read))
    cached_tokens = sum(rollout.num_cached_tokens for rollout in written)
    stopped = sum(rollout.stop_reason == "stop" for rollout in written)
    return {
        "step": batch.step,
        "stage": batch.stage,
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
        "staleness/mean": sum(ages) / len(ages) if ages else 0.0,
        **staleness_metrics(batch, trained.samples),
        **_reward_metrics(batch),
        "tokens/generated": generated,
        "tokens/trained": trained.num_tokens,
        "rollout/mean_length": generated / len(written) if written else None,
        "rollout/stopped_fraction": stopped / len(written) if written else None,
        "rollout/prefix_cached_fraction": cached_tokens / prompt_tokens if prompt_tokens else None,
        "teacher/signal_bytes": batch.signal_bytes,
        **({"teacher/cache_hits": batch.num_found / batch.num_looked_up} if batch.num_looked_up else {}),
        "time/rollout_s": batch.rollout_s,
        "time/teacher_s": batch.teacher_s,
        "time/train_s": train_s,
        "time/rollout_wait_s": batch.rollout_wait_s,
        "time/teacher_wait_s": batch.teacher_wait_s,
        "time/train_wait_s": wait_s,
        "time/step_s": train_s + wait_s,
        "source/on_policy": own / len(batch.rollouts),
    }


def _reward_metrics(batch: ScoredBatch) -> dict[str, float]:
    """Of what the student wrote: the dataset's rewards do not change while it learns."""
    if batch.rewards is None:
        return {}
    pairs = zip(batch.rollouts, batch.rewards, strict=True)
    own = [reward for rollout, reward in pairs if rollout.source == "student"]
    measured = {"reward/mean": fmean(own), "reward/std": pstdev(own)} if own else {}
    return measured | {"time/reward_wait_s": batch.reward_wait_s}
