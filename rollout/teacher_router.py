"""Several teachers as one: each sample goes to its own, or every sample to all of them."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

from gkd.interfaces import GroupKey, MixedSignals, Post, ScoredGroup, Scores, SignalRef, Teachers
from gkd.types import Rollout

Deliver = Callable[[GroupKey, ScoredGroup], None]


class Pool(Teachers, Scores, Protocol):
    """The workers of one teacher."""


class RoutedTeachers:
    """Scoring groups that go to one teacher each: the one that their samples name."""

    def __init__(self, pools: Mapping[str, Pool]) -> None:
        """Teachers by name."""
        self._pools = dict(pools)

    def connect(self, post: Post, deliver: Deliver) -> None:
        """Say where scored groups go."""
        for pool in self._pools.values():
            pool.connect(post, deliver)

    def submit(self, key: GroupKey, rollouts: Sequence[Rollout]) -> None:
        """Score a group of one teacher's samples."""
        self._pools[_teacher_of(rollouts)].submit(key, rollouts)

    def idle_s(self) -> float:
        """How long the teachers have had nothing to do so far, in seconds, on average."""
        return _mean_idle_s(list(self._pools.values()))

    def score_now(self, groups: Sequence[Sequence[Rollout]]) -> list[SignalRef]:
        """Handles to the signals of some groups, each of one teacher's samples; for evaluation."""
        signals: dict[int, SignalRef] = {}
        for name, pool in self._pools.items():
            own = [number for number, group in enumerate(groups) if _teacher_of(group) == name]
            if own:
                signals |= zip(own, pool.score_now([groups[number] for number in own]), strict=True)
        return [signals[number] for number in range(len(groups))]


class MixedTeachers:
    """Scoring groups that go to every teacher, and come back as one when all have answered."""

    def __init__(self, pools: Sequence[Pool], weights: Sequence[float]) -> None:
        """Teachers and their weights in the mixture, 1 in sum."""
        self._pools = list(pools)
        self._weights = tuple(weights)
        self._scored: dict[GroupKey, dict[int, ScoredGroup]] = {}

    def connect(self, post: Post, deliver: Deliver) -> None:
        """Say where scored groups go."""
        self._deliver = deliver
        for number, pool in enumerate(self._pools):
            pool.connect(post, partial(self._answered, number))

    def submit(self, key: GroupKey, rollouts: Sequence[Rollout]) -> None:
        """Score a group."""
        self._scored[key] = {}
        for pool in self._pools:
            pool.submit(key, rollouts)

    def idle_s(self) -> float:
        """How long the teachers have had nothing to do so far, in seconds, on average."""
        return _mean_idle_s(self._pools)

    def score_now(self, groups: Sequence[Sequence[Rollout]]) -> list[SignalRef]:
        """Handles to the signals of some groups; for evaluation."""
        of_each = [pool.score_now(groups) for pool in self._pools]
        return [MixedSignals(signals, self._weights) for signals in zip(*of_each, strict=True)]

    def _answered(self, number: int, key: GroupKey, scored: ScoredGroup) -> None:
        """Teacher `number` has scored a group."""
        self._scored[key][number] = scored
        if len(self._scored[key]) < len(self._pools):
            return
        answers = self._scored.pop(key)
        parts = [answers[i] for i in range(len(self._pools))]
        mixed = ScoredGroup(
            signals=MixedSignals(tuple(part.signals for part in parts), self._weights),
            seconds=sum(part.seconds for part in parts),
            num_bytes=sum(part.num_bytes for part in parts),
            num_looked_up=sum(part.num_looked_up for part in parts),
            num_found=sum(part.num_found for part in parts),
        )
        self._deliver(key, mixed)


def _teacher_of(rollouts: Sequence[Rollout]) -> str:
    names = {rollout.teacher for rollout in rollouts}
    assert len(names) == 1, "a scoring group holds samples of one teacher"
    name = names.pop()
    assert name is not None, "where records have teachers of their own, every record has one"
    return name


def _mean_idle_s(pools: Sequence[Pool]) -> float:
    return sum(pool.idle_s() for pool in pools) / len(pools)
