"""Ray around the student: a thin actor for one training rank, and the driver's handle on it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray

from gkd.interfaces import WeightBuckets, WeightUpdate
from gkd.types import Rollout, SampleId, ScoredRollout
from trainer.step import StepReport
from trainer.student import Student, StudentSettings


@ray.remote
class TrainerActor:
    """One rank."""

    def __init__(self, settings: StudentSettings) -> None:
        self._student = Student(settings)

    def ready(self) -> bool:
        """Returns once model and engine are up."""
        return True

    def step(
        self,
        number: int,
        rollouts: Sequence[Rollout],
        groups: Sequence[Sequence[SampleId]],
        signal_refs: Sequence[Any],
    ) -> StepReport:
        """Train on a batch whose signals are still in the object store."""
        signals: dict[SampleId, Any] = {}
        for group, ref in zip(groups, signal_refs, strict=True):
            values = ray.get(ref) if ref is not None else [None] * len(group)
            signals |= zip(group, values, strict=True)
        return self._student.step(number, [ScoredRollout(rollout=r, signal=signals[r.id]) for r in rollouts])

    def logprobs(self, rollouts: Sequence[Rollout]) -> list[list[float]]:
        """Log-probabilities of responses under the current weights."""
        return self._student.logprobs(rollouts)

    def send_weights(self) -> Iterator[WeightUpdate]:
        """One message a bucket; each becomes an object that the driver owns."""
        yield from self._student.send_weights()

    def sent_bytes(self) -> int:
        """Bytes of the last `send_weights`."""
        return self._student.sent_bytes

    def save(self, folder: Path) -> None:
        """Write training state."""
        self._student.save(folder)

    def load(self, folder: Path) -> None:
        """Read training state."""
        self._student.load(folder)

    def export(self, folder: Path) -> None:
        """Write the model in Hugging Face format."""
        self._student.export(folder)


class Learner:
    """The driver's handle on the training ranks."""

    def __init__(self, actor: Any, *, timeout_s: float) -> None:
        self._actor = actor
        self._timeout_s = timeout_s

    def step(self, number: int, rollouts: Sequence[Rollout], groups: Any, signals: Sequence[Any]) -> StepReport:
        """Optimizer step `number`. The references stay with the driver, which owns them."""
        return self._get(self._actor.step.remote(number, rollouts, groups, list(signals)))

    def logprobs(self, rollouts: Sequence[Rollout]) -> list[list[float]]:
        """Log-probabilities of responses under the current weights."""
        return self._get(self._actor.logprobs.remote(rollouts))

    def publish(self, version: int) -> WeightBuckets:
        """The current weights, packed, as objects that the driver owns."""
        buckets = self._actor.send_weights.options(num_returns="streaming").remote()
        refs: list[Any] = []
        while True:
            if not ray.wait([buckets], timeout=self._timeout_s)[0]:
                raise TimeoutError(f"the trainer sent no weights in {self._timeout_s:g} s")
            try:
                refs.append(next(buckets))
            except StopIteration:
                break
        return WeightBuckets(version=version, updates=refs, num_bytes=self._get(self._actor.sent_bytes.remote()))

    def save(self, folder: Path) -> None:
        """Write training state."""
        self._get(self._actor.save.remote(folder))

    def load(self, folder: Path) -> None:
        """Read training state."""
        self._get(self._actor.load.remote(folder))

    def export(self, folder: Path) -> None:
        """Write the model in Hugging Face format."""
        self._get(self._actor.export.remote(folder))

    def _get(self, ref: Any) -> Any:
        return ray.get(ref, timeout=self._timeout_s)
