"""What a run leaves behind while it runs: metrics, the ledger of trained samples, and rollouts as text."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gkd.types import Rollout

Detokenize = Callable[[Sequence[int]], str]


class Records:
    """Appends one line a step to `metrics.jsonl`, one a sample to `samples.jsonl`, and some rollouts as text.

    Lines are flushed at every step, and brought to disk before a checkpoint is written.
    """

    def __init__(
        self, folder: Path, detokenize: Detokenize, *, rollouts_every: int, rollouts_kept: int, completed_steps: int
    ) -> None:
        """Open the files; what lies after step `completed_steps` is cut off, for those steps run again."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            _cut_back(folder / name, completed_steps)
        self._metrics = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._samples = (folder / "samples.jsonl").open("a", encoding="utf-8")
        self._rollouts = folder / "rollouts"
        self._rollouts.mkdir(exist_ok=True)
        self._detokenize = detokenize
        self._rollouts_every = rollouts_every
        self._rollouts_kept = rollouts_kept

    def write(
        self, step: int, metrics: dict[str, Any], rollouts: Sequence[Rollout], rewards: Sequence[float] | None
    ) -> None:
        """Record one trained step; `rewards` are None where there is no reward function."""
        given: Sequence[float | None] = [None] * len(rollouts) if rewards is None else rewards
        for rollout, reward in zip(rollouts, given, strict=True):
            self._samples.write(json.dumps(_ledger_line(step, rollout, reward)) + "\n")
        self._samples.flush()
        self._metrics.write(json.dumps(metrics) + "\n")
        self._metrics.flush()
        if self._rollouts_every and (step == 1 or step % self._rollouts_every == 0):
            self._write_rollouts(step, list(zip(rollouts, given, strict=True))[: self._rollouts_kept])

    def flush_to_disk(self) -> None:
        """Make sure that what was recorded survives a power cut."""
        for file in (self._metrics, self._samples):
            os.fsync(file.fileno())

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *_: object) -> None:
        self._metrics.close()
        self._samples.close()

    def _write_rollouts(self, step: int, rollouts: Sequence[tuple[Rollout, float | None]]) -> None:
        blocks = [
            f"### epoch {r.id.epoch}, prompt {r.id.prompt_index}, sample {r.id.sample_index}: {r.source}, "
            f"{len(r.response_ids)} tokens, ended by {r.stop_reason}"
            f"{'' if reward is None else f', reward {reward:g}'}\n"
            f"{self._detokenize(r.prompt_ids)}\n>>> {self._detokenize(r.response_ids)}\n"
            for r, reward in rollouts
        ]
        (self._rollouts / f"step_{step}.txt").write_text("\n".join(blocks), encoding="utf-8")


def _ledger_line(step: int, rollout: Rollout, reward: float | None) -> dict[str, Any]:
    line = {
        "step": step,
        "epoch": rollout.id.epoch,
        "prompt_index": rollout.id.prompt_index,
        "sample_index": rollout.id.sample_index,
        "source": rollout.source,
        "versions": list(rollout.versions) if rollout.versions else None,
        "tokens": len(rollout.response_ids),
        "stop_reason": rollout.stop_reason,
    }
    return line if reward is None else line | {"reward": reward}


def _cut_back(path: Path, completed_steps: int) -> None:
    """Keep the lines of completed steps. A last line that a crash cut in two belongs to none."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] > completed_steps:
            break
        kept.append(line)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)
