"""Curves of a run as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def plot_curves(metrics: Sequence[dict[str, Any]], path: Path, *, title: str) -> None:
    """Loss, response length, gap and time per step over the steps of `metrics.jsonl`, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [line["step"] for line in metrics]
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 6), sharex=True, layout="constrained")
    loss, length, gap, seconds = axes.flat

    losses = np.array([line["loss/total"] for line in metrics])
    loss.plot(steps, losses, color="0.8", label="each step")
    window = max(1, len(losses) // 25)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    loss.plot(steps[window - 1 :], smooth, color="C0", label=f"mean of {window} steps")
    loss.set(title="loss (nats per token)", ylim=(0, None))
    loss.legend(frameon=False)

    length.plot(steps, [line["rollout/mean_length"] or np.nan for line in metrics], color="C1")
    length.set(title="response length (tokens)")

    gap.semilogy(steps, [line["sync/logprob_gap_max"] or np.nan for line in metrics], ".", markersize=3, color="C2")
    gap.set(title="served = trained: largest gap (nats)", xlabel="step")

    parts = ["time/train_wait_s", "time/train_s"]
    labels = ["waiting for sync, rollouts and teacher", "training"]
    seconds.stackplot(steps, *([line[part] for line in metrics] for part in parts), labels=labels)
    seconds.set(
        title="seconds per step", xlabel="step", ylim=(0, np.percentile([m["time/step_s"] for m in metrics], 99))
    )
    seconds.legend(frameon=False, fontsize="small", loc="upper right")

    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
