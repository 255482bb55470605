"""Ray around the teacher: a thin actor, and the driver's handle on all of them."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import ray

from gkd.head import HeadWeights
from gkd.interfaces import GroupKey, Post, ScoredGroup, SignalRef
from gkd.signals import TeacherSignal
from gkd.types import Rollout
from rollout.hf_teacher import HfTeacher, TeacherSettings
from rollout.idle import IdleClock
from rollout.vllm_teacher import VllmTeacher, VllmTeacherSettings

_GROUPS_AHEAD = 2
"""Groups queued at an actor: it goes on while the driver handles the group before."""


@ray.remote
class TeacherActor:
    """Holds one teacher model. One on transformers never imports vllm, which would break the models built after it."""

    def __init__(self, settings: TeacherSettings | VllmTeacherSettings) -> None:
        self._teacher = VllmTeacher(settings) if isinstance(settings, VllmTeacherSettings) else HfTeacher(settings)

    def ready(self) -> bool:
        """Returns once the model is loaded."""
        return True

    def head(self) -> HeadWeights:
        """What turns its hidden states into logits, where it sends such."""
        assert isinstance(self._teacher, HfTeacher), "vLLM sends none"
        return self._teacher.head()

    @ray.method(num_returns=2)
    def score(self, rollouts: Sequence[Rollout]) -> tuple[tuple[float, int], list[TeacherSignal]]:
        """(seconds, bytes), and the signals: two objects, so that the driver reads the first and never the second."""
        start = time.perf_counter()
        signals = self._teacher.score(rollouts)
        num_bytes = sum(signal.num_bytes for signal in signals)
        return (time.perf_counter() - start, num_bytes), signals


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
        account, signals = teacher.actor.score.remote(rollouts)

        def finished(call: "Future[tuple[float, int]]") -> None:
            teacher.num_groups -= 1
            self._hand_out()
            if teacher.num_groups == 0:
                teacher.clock.rest()
            seconds, num_bytes = call.result()
            self._deliver(key, ScoredGroup(signals=signals, seconds=seconds, num_bytes=num_bytes))

        # The callback runs on a thread of Ray's; the pipeline's thread does the rest.
        account.future().add_done_callback(lambda done: self._post(lambda: finished(done)))
