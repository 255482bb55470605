"""What the age of samples does to a step: how far the student has moved since it wrote them.

All of it compares the log-probabilities of the sampled tokens that the engine recorded with those that the trainer
finds when it trains on them, at temperature 1. It is noise where the engine's weights were the trainer's: two
implementations of one model differ by rounding.
"""

from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from gkd.interfaces import ScoredBatch
from trainer.sample_data import SampleReport


def staleness_metrics(batch: ScoredBatch, reports: Mapping[int, SampleReport]) -> dict[str, float]:
    """The keys under `staleness/` that need recorded log-probabilities; none where there are none.

    With r = p(token now) / p(token when it was sampled), over all tokens that the student wrote:

    - `ratio_mean`, `ratio_p95`, `ratio_max` of r. The mean is 1 but for noise, if tokens were sampled from the recorded
      distribution: at `rollout.temperature: 1` and `top_p: 1`.
    - `ess`: effective sample size (sum r)^2 / (n sum r^2), a fraction of the n tokens.
    - `kl_to_sampler`: KL(sampler || student) in nats per token, estimated by the mean of r - 1 - log r, which is never
      negative ("k3", Schulman, Approximating KL Divergence, 2020).
    - `kl_age_K` and `loss_age_K`: the same KL, and the loss per token, of the samples that were begun K optimizer steps
      before the weights that they train.

    Args:
        batch: what was trained on.
        reports: by the index of the rollout in the batch.
    """
    logs: dict[int, list[np.ndarray]] = defaultdict(list)
    losses: dict[int, list[SampleReport]] = defaultdict(list)
    for i, report in reports.items():
        rollout = batch.rollouts[i]
        if rollout.logprobs is None or rollout.versions is None or np.isnan(report.logprobs_T).any():
            continue
        age = batch.step - 1 - rollout.versions[0]
        logs[age].append(report.logprobs_T.astype(np.float64) - np.asarray(rollout.logprobs))
        losses[age].append(report)
    if not logs:
        return {}
    by_age = {age: np.concatenate(logs[age]) for age in sorted(logs)}
    every = np.concatenate(list(by_age.values()))
    ratios = np.exp(every)
    found = {
        "ratio_mean": ratios.mean(),
        "ratio_p95": np.quantile(ratios, 0.95),
        "ratio_max": ratios.max(),
        "ess": ratios.sum() ** 2 / (len(ratios) * (ratios**2).sum()),
        "kl_to_sampler": _kl(every),
    }
    for age, log_ratios in by_age.items():
        found[f"kl_age_{age}"] = _kl(log_ratios)
        tokens = sum(report.num_tokens for report in losses[age])
        found[f"loss_age_{age}"] = sum(report.loss for report in losses[age]) / max(tokens, 1)
    return {f"staleness/{name}": float(value) for name, value in found.items()}


def _kl(log_ratios: np.ndarray) -> float:
    return float((np.expm1(log_ratios) - log_ratios).mean())
