"""Ray around the teacher: a thin actor, and the driver's handle on all of them."""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray

from gkd.head import HeadWeights
from gkd.interfaces import GroupKey, Post, ScoredGroup, SignalRef
from gkd.signals import TeacherSignal
from gkd.trace import Lane, TracedWorker
from gkd.types import Rollout
from rollout.cached_teacher import CachedTeacher, Teacher, head_of
from rollout.hf_teacher import HfTeacher, TeacherSettings
from rollout.idle import IdleClock
from rollout.signal_store import CacheSettings
from rollout.vllm_teacher import VllmTeacher, VllmTeacherSettings

_GROUPS_AHEAD = 2
"""Groups queued at an actor: it goes on while the driver handles the group before."""


@dataclass(frozen=True, slots=True)
class Account:
    """What the driver is told of a scored group."""

    seconds: float
    """Time that it took."""
    num_bytes: int
    """Size of the signals."""
    num_looked_up: int = 0
    """Samples whose signal may have been on disk; 0 where the teacher has no cache."""
    num_found: int = 0
    """How many of those were."""


@ray.remote
class TeacherActor(TracedWorker):
    """Holds one teacher model. One on transformers never imports vllm, which would break the models built after it."""

    def __init__(self, settings: TeacherSettings | VllmTeacherSettings) -> None:
        super().__init__(Lane())
        start, cache = _starter(settings)
        self._cached = None if cache is None else CachedTeacher(start, cache)
        self._teacher: Teacher = self._cached or start()

    def ready(self) -> bool:
        """Returns once the model is loaded; with a cache, once that is read."""
        return True

    def head(self) -> HeadWeights:
        """What turns its hidden states into logits, where it sends such."""
        return head_of(self._teacher)

    @ray.method(num_returns=2)
    def score(self, rollouts: Sequence[Rollout]) -> tuple[Account, list[TeacherSignal]]:
        """An account, and the signals: two objects, so that the driver reads the first and never the second."""
        num_tokens = sum(rollout.num_scored_tokens for rollout in rollouts)
        with self._lane.span("score", samples=len(rollouts), tokens=num_tokens) as scoring:
            signals = self._teacher.score(rollouts)
        num_bytes = sum(signal.num_bytes for signal in signals)
        looked_up = (self._cached.num_looked_up, self._cached.num_found) if self._cached else ()
        return Account(scoring.seconds, num_bytes, *looked_up), signals


def _starter(settings: TeacherSettings | VllmTeacherSettings) -> tuple[Callable[[], Teacher], CacheSettings | None]:
    """What loads the teacher, and where its signals are kept."""
    if isinstance(settings, VllmTeacherSettings):
        return partial(VllmTeacher, settings), settings.teacher.cache
    return partial(HfTeacher, settings), settings.cache


class _Teacher:
    """What the driver knows of one teacher."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.num_groups = 0
        self.clock = IdleClock()


class TeacherPool:
    """The driver's handle on the teachers (`gkd.interfaces.Teachers`). A group goes to whoever has fewest."""

    def __init__(self, actors: Sequence[Any], *, timeout_s: float) -> None:
        self._teachers = [_Teacher(actor) for actor in actors]
        self._waiting: deque[tuple[GroupKey, list[Rollout]]] = deque()
        self._timeout_s = timeout_s

    def connect(self, post: Post, deliver: Callable[[GroupKey, ScoredGroup], None]) -> None:
        """Say where scored groups go."""
        self._post = post
        self._deliver = deliver

    def submit(self, key: GroupKey, rollouts: Sequence[Rollout]) -> None:
        """Score a group."""
        self._waiting.append((key, list(rollouts)))
        self._hand_out()

    def idle_s(self) -> float:
        """How long the teachers have had nothing to do so far, in seconds, on average."""
        return sum(teacher.clock.read() for teacher in self._teachers) / len(self._teachers)

    def score_now(self, groups: Sequence[Sequence[Rollout]]) -> list[SignalRef]:
        """Handles to the signals of some groups, when all are scored; for evaluation."""
        calls = [
            self._teachers[number % len(self._teachers)].actor.score.remote(list(group))
            for number, group in enumerate(groups)
        ]
        ray.get([account for account, _ in calls], timeout=self._timeout_s)
        return [signals for _, signals in calls]

    def _hand_out(self) -> None:
        while self._waiting:
            teacher = min(self._teachers, key=lambda teacher: teacher.num_groups)
            if teacher.num_groups >= _GROUPS_AHEAD:
                return
            self._call(teacher, *self._waiting.popleft())

    def _call(self, teacher: _Teacher, key: GroupKey, rollouts: list[Rollout]) -> None:
        teacher.num_groups += 1
        teacher.clock.work()
        told, signals = teacher.actor.score.remote(rollouts)

        def finished(call: "Future[Account]") -> None:
            teacher.num_groups -= 1
            self._hand_out()
            if teacher.num_groups == 0:
                teacher.clock.rest()
            account = call.result()
            scored = ScoredGroup(
                signals=signals,
                seconds=account.seconds,
                num_bytes=account.num_bytes,
                num_looked_up=account.num_looked_up,
                num_found=account.num_found,
            )
            self._deliver(key, scored)

        # The callback runs on a thread of Ray's; the pipeline's thread does the rest.
        told.future().add_done_callback(lambda done: self._post(lambda: finished(done)))
