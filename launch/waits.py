"""Who waited in a finished run: the share of its steps in which each kind of worker had nothing to do."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

_WAITS = {
    "rollout": ("time/rollout_wait_s", "tokens/generated"),
    "teacher": ("time/teacher_wait_s", "time/teacher_s"),
    "trainer": ("time/train_wait_s", "tokens/trained"),
}
"""Worker -> its wait, and what is above 0 where there is such a worker."""


def idle_shares(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Worker -> its wait as a share of the step, 0 to 1. Both are medians: a step beside a checkpoint is no rule.

    Workers that the run has not are left out.

    Args:
        lines: of `metrics.jsonl`, at least one.
    """
    step_s = median(line["time/step_s"] for line in lines)
    return {
        worker: min(1.0, median(line[wait] for line in lines) / step_s)
        for worker, (wait, sign) in _WAITS.items()
        if any(line[sign] for line in lines)
    }
