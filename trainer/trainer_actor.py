"""Ray around the student: a thin actor for one training rank, and the driver's handle on all of them."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from gkd.config.objective import DivergenceConfig, Reduction
from gkd.interfaces import MixedSignals, WeightUpdate
from gkd.signals import Mixture, TeacherSignal
from gkd.stages import ByStep
from gkd.trace import TracedWorker
from gkd.types import Rollout, SampleId, ScoredRollout
from trainer.share import RankShare, share_out
from trainer.step import StepReport
from trainer.student import Student, StudentSettings

Advantages = Callable[[Sequence[Rollout], Sequence[float]], Sequence[float]]
"""From the rewards of a whole batch to each sample's advantage (`gkd.advantages`)."""


@ray.remote
class TrainerActor(TracedWorker):
    """One rank."""

    def __init__(self, settings: StudentSettings) -> None:
        self._student = Student(settings)
        super().__init__(self._student.lane)

    def ready(self) -> bool:
        """Returns once model and engine are up."""
        return True

    def step(self, number: int, part: "RankPart") -> StepReport:
        """Train on a share whose signals are still in the object store."""
        with self._lane.span("step", step=number):
            with self._lane.span("fetch signals"):
                samples = part.open()
            return self._student.step(number, samples, part.share)

    def logprobs(self, rollouts: Sequence[Rollout]) -> list[list[float]]:
        """Log-probabilities of responses under the current weights."""
        with self._lane.span("score probe"):
            return self._student.logprobs(rollouts)

    def take_heads(self, heads: dict[str, Any]) -> None:
        """Handles to the heads of the teachers that send hidden states, by name."""
        self._student.take_heads({name: ray.get(ref) for name, ref in heads.items()})

    def divergence(self, part: "RankPart", config: DivergenceConfig, temperature: float) -> tuple[float, int]:
        """Sum of a divergence over the response tokens of all ranks, and their number."""
        with self._lane.span("divergence"):
            return self._student.divergence(part.open(), part.share, config, temperature)

    def negative_log_likelihood(self, part: "RankPart") -> tuple[float, int]:
        """Sum over the response tokens of all ranks, and their number."""
        with self._lane.span("cross entropy"):
            return self._student.negative_log_likelihood(part.open(), part.share)

    def open_wire(self, workers: Sequence[int], modules: Collection[str]) -> list[dict[str, Any]]:
        """What each engine needs to know to be connected."""
        return self._student.open_wire(workers, modules)

    def connect_wire(self) -> None:
        """Connect to the engines."""
        self._student.connect_wire()

    def send_weights(self) -> Iterator[WeightUpdate]:
        """One message a bucket; each becomes an object that the driver owns."""
        with self._lane.span("send weights"):
            yield from self._student.send_weights()

    def follow_weights(self) -> None:
        """Help rank 0 to send."""
        with self._lane.span("send weights"):
            self._student.follow_weights()

    def sent_bytes(self) -> int:
        """Bytes of the last `send_weights`."""
        return self._student.sent_bytes

    def save(self, folder: Path) -> None:
        """Write training state."""
        with self._lane.span("save"):
            self._student.save(folder)

    def load(self, folder: Path, completed_steps: int) -> None:
        """Read the training state after so many steps."""
        self._student.load(folder, completed_steps=completed_steps)

    def export(self, folder: Path) -> None:
        """Write the model in Hugging Face format."""
        self._student.export(folder)


class RankPart:
    """What one rank is sent of a batch: its own samples, and handles to the scoring groups that hold them."""

    def __init__(
        self,
        share: RankShare,
        rollouts: Sequence[Rollout],
        groups: Sequence[Sequence[SampleId]],
        signals: Sequence[Any],
        rewards: Sequence[float | None],
        advantages: Sequence[float | None],
    ) -> None:
        """Take what `share` names out of the whole batch."""
        self.share = share
        self._rollouts = [rollouts[i] for i in share.samples]
        self._rewards = [(rewards[i], advantages[i]) for i in share.samples]
        own = {rollout.id for rollout in self._rollouts}
        # Handles inside a list stay handles: each rank opens only the groups that it needs.
        self._groups = [(group, ref) for group, ref in zip(groups, signals, strict=True) if own.intersection(group)]

    def open(self) -> list[ScoredRollout]:
        """The share's samples with their signals, fetched from the object store."""
        signals: dict[SampleId, Any] = {}
        for group, ref in self._groups:
            values = _opened(ref) if ref is not None else [None] * len(group)
            signals |= zip(group, values, strict=True)
        return [
            ScoredRollout(rollout=rollout, signal=signals[rollout.id], reward=reward, advantage=advantage)
            for rollout, (reward, advantage) in zip(self._rollouts, self._rewards, strict=True)
        ]


def _opened(ref: Any) -> list[TeacherSignal]:
    """The signals of a scoring group."""
    if not isinstance(ref, MixedSignals):
        return ray.get(ref)
    of_each = ray.get(list(ref.signals))
    return [Mixture(tuple(parts), ref.weights) for parts in zip(*of_each, strict=True)]


@dataclass(frozen=True, slots=True)
class BatchRules:
    """What is made of a whole batch before it is shared out."""

    reduction: Reduction
    """Which mean over the batch's tokens is the loss."""
    advantages: Advantages | None
    """From rewards to advantages; None where there is no reward function."""


_ONLY_ADDED = BatchRules("token_mean", None)
"""Of an evaluation, whose divergences are added up without any weights."""


class Learner:
    """The driver's handle on the training ranks."""

    def __init__(
        self,
        ranks: Sequence[Any],
        *,
        rules: ByStep[BatchRules],
        tokens_per_micro_batch: int,
        timeout_s: float,
    ) -> None:
        """`ranks` are the actors, rank 0 first; `rules` are those of each stage."""
        self._ranks = list(ranks)
        self._rules = rules
        self._tokens_per_micro_batch = tokens_per_micro_batch
        self._timeout_s = timeout_s

    def step(
        self,
        number: int,
        rollouts: Sequence[Rollout],
        groups: Sequence[Sequence[SampleId]],
        signals: Sequence[Any],
        rewards: Sequence[float] | None,
    ) -> StepReport:
        """Optimizer step `number`. The references stay with the driver, which owns them."""
        parts = self._parts(rollouts, groups, signals, rewards, self._rules.at(number).value)
        calls = [rank.step.remote(number, part) for rank, part in zip(self._ranks, parts, strict=True)]
        reports: list[StepReport] = self._get(calls)
        samples = {index: sample for report in reports for index, sample in report.samples.items()}
        return replace(reports[0], samples=samples)

    def divergence(
        self,
        rollouts: Sequence[Rollout],
        groups: Sequence[Sequence[SampleId]],
        signals: Sequence[Any],
        config: DivergenceConfig,
        temperature: float,
    ) -> tuple[float, int]:
        """Sum of a divergence to the teacher over all response tokens, and their number."""
        parts = self._parts(rollouts, groups, signals, None, _ONLY_ADDED)
        calls = [
            rank.divergence.remote(part, config, temperature) for rank, part in zip(self._ranks, parts, strict=True)
        ]
        return self._get(calls)[0]

    def negative_log_likelihood(self, rollouts: Sequence[Rollout]) -> tuple[float, int]:
        """Sum over all response tokens in the loss, in nats, and their number."""
        parts = self._parts(rollouts, [[rollout.id for rollout in rollouts]], [None], None, _ONLY_ADDED)
        calls = [rank.negative_log_likelihood.remote(part) for rank, part in zip(self._ranks, parts, strict=True)]
        return self._get(calls)[0]

    def take_heads(self, heads: dict[str, Any]) -> None:
        """Handles to the heads of the teachers that send hidden states, by name."""
        self._on_all("take_heads", heads)

    def logprobs(self, rollouts: Sequence[Rollout]) -> list[list[float]]:
        """Log-probabilities of responses under the current weights."""
        return self._on_all("logprobs", rollouts)[0]

    def publish(self) -> Iterator[WeightUpdate]:
        """The current weights, one message a bucket, as objects that the driver owns; made as they are asked for.

        Raises:
            TimeoutError: if the next one is not there in time.
        """
        followers = [rank.follow_weights.remote() for rank in self._ranks[1:]]
        # One message ahead: the next bucket is packed while this one is loaded, and no more than two are ever held.
        options = {"num_returns": "streaming", "_generator_backpressure_num_objects": 1}
        messages = self._ranks[0].send_weights.options(**options).remote()
        while True:
            ready, _ = ray.wait([messages, *followers], timeout=self._timeout_s)
            if not ready:
                raise TimeoutError(f"the trainer sent no weights in {self._timeout_s:g} s")
            if messages not in ready:
                ray.get(ready)  # a rank that failed is why the first one would wait in vain
                followers = [follower for follower in followers if follower not in ready]
                continue
            try:
                message = next(messages)
            except StopIteration:
                break
            yield message
        self._get(followers)

    def sent_bytes(self) -> int:
        """Bytes of weights in the last `publish`."""
        return ray.get(self._ranks[0].sent_bytes.remote(), timeout=self._timeout_s)

    def save(self, folder: Path) -> None:
        """Write training state."""
        self._on_all("save", folder)

    def load(self, folder: Path, *, completed_steps: int) -> None:
        """Read the training state after so many steps."""
        self._on_all("load", folder, completed_steps)

    def export(self, folder: Path) -> None:
        """Write the model in Hugging Face format."""
        self._on_all("export", folder)

    def _parts(
        self,
        rollouts: Sequence[Rollout],
        groups: Sequence[Sequence[SampleId]],
        signals: Sequence[Any],
        rewards: Sequence[float] | None,
        rules: BatchRules,
    ) -> list[RankPart]:
        none: Sequence[None] = [None] * len(rollouts)
        # Before the batch is split: an advantage compares samples that may go to different ranks.
        advantages = none if rules.advantages is None or rewards is None else rules.advantages(rollouts, rewards)
        shares = share_out(
            rollouts,
            num_ranks=len(self._ranks),
            tokens_per_micro_batch=self._tokens_per_micro_batch,
            reduction=rules.reduction,
        )
        given = none if rewards is None else rewards
        return [RankPart(share, rollouts, groups, signals, given, advantages) for share in shares]

    def _on_all(self, method: str, *args: Any) -> list[Any]:
        return self._get([getattr(rank, method).remote(*args) for rank in self._ranks])

    def _get(self, calls: list[Any]) -> list[Any]:
        return ray.get(calls, timeout=self._timeout_s)
