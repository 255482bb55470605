"""Which stage bounded the steps of a run, from the times and waits in `metrics.jsonl`."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_NAMES = {
    "rollout": "rollout engines",
    "teacher": "teachers",
    "reward": "reward function",
    "trainer": "trainer",
    "sync": "weight sync",
    "eval": "evaluation",
}
"""The stages, as they are called in sentences."""


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """What a run spent its time on."""

    stage: str
    """The stage that was idle least: `rollout`, `teacher`, `reward`, `trainer`, `sync` or `eval`."""
    idle: dict[str, float]
    """By stage, the share of the time in which it had nothing to do, 0 to 1; of several engines or teachers on average.
    Stages that never worked are left out."""

    def __str__(self) -> str:
        others = sorted((name for name in self.idle if name != self.stage), key=lambda name: self.idle[name])
        shares = ", ".join(f"{_NAMES[name]} {self.idle[name]:.0%}" for name in others)
        return (
            f"the {_NAMES[self.stage]} bounded the steps, idle {self.idle[self.stage]:.0%} of the time"
            f"{f' (idle: {shares})' if others else ''}"
        )


class Waits:
    """Adds up the lines of `metrics.jsonl`, in their order; keeps one of them."""

    def __init__(self) -> None:
        self._before: Mapping[str, Any] | None = None
        self._seconds = 0.0
        self._busy: dict[str, float] = defaultdict(float)

    def add(self, line: Mapping[str, Any]) -> None:
        """Add a step.

        A step's batch was made while the step before was trained and the trainer waited. So the waits of the workers
        in a line belong to the time that the line before tells of.
        """
        before, self._before = self._before, line
        if before is None:
            return
        seconds = before["time/step_s"] + before.get("time/eval_s", 0.0)
        self._seconds += seconds
        self._busy["trainer"] += before["time/train_s"]
        self._busy["sync"] += before["sync/seconds"]
        self._busy["eval"] += before.get("time/eval_s", 0.0)
        # Engines and teachers that a step does not ask do not wait either.
        for stage, works in (
            ("rollout", line["time/rollout_s"] > 0),
            ("teacher", line["time/teacher_s"] > 0),
            ("reward", "time/reward_wait_s" in line),
        ):
            self._busy[stage] += seconds - line[f"time/{stage}_wait_s"] if works else 0.0

    def bottleneck(self) -> Bottleneck | None:
        """What the steps so far were bound by; None before there are two."""
        if self._seconds == 0:
            return None
        # Batches are made ahead, so the waits of a few steps may be of a little more time than the steps themselves.
        idle = {stage: min(max(1 - busy / self._seconds, 0.0), 1.0) for stage, busy in self._busy.items() if busy != 0}
        return Bottleneck(min(idle, key=lambda stage: idle[stage]), idle)


def bottleneck(lines: Iterable[Mapping[str, Any]]) -> Bottleneck | None:
    """What bounded the steps of a run, from its lines in `metrics.jsonl`; None of less than two.

    Of a step that follows a resume, the workers' waits are those since the resumed run began.
    """
    waits = Waits()
    for line in lines:
        waits.add(line)
    return waits.bottleneck()
