"""Ray around the teacher: a thin actor, and the driver's handle on it."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import ray

from gkd.interfaces import GroupKey, Post, ScoredGroup
from gkd.signals import TeacherSignal
from gkd.types import Rollout
from rollout.hf_teacher import HfTeacher, TeacherSettings


@ray.remote
class TeacherActor:
    """Holds one teacher model."""

    def __init__(self, settings: TeacherSettings) -> None:
        self._teacher = HfTeacher(settings)

    def ready(self) -> bool:
        """Returns once the model is loaded."""
        return True

    @ray.method(num_returns=2)
    def score(self, rollouts: Sequence[Rollout]) -> tuple[tuple[float, int], list[TeacherSignal]]:
        """(seconds, bytes), and the signals: two objects, so that the driver reads the first and never the second."""
        start = time.perf_counter()
        signals = self._teacher.score(rollouts)
        num_bytes = sum(signal.logits_TV.nbytes for signal in signals)
        return (time.perf_counter() - start, num_bytes), signals


class TeacherPool:
    """The driver's handle on the teacher (`gkd.interfaces.Teachers`)."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def connect(self, post: Post, deliver: Callable[[GroupKey, ScoredGroup], None]) -> None:
        """Say where scored groups go."""
        self._post = post
        self._deliver = deliver

    def submit(self, key: GroupKey, rollouts: Sequence[Rollout]) -> None:
        """Score a group."""
        account, signals = self._actor.score.remote(list(rollouts))

        def finished(call: "Future[tuple[float, int]]") -> None:
            seconds, num_bytes = call.result()
            self._deliver(key, ScoredGroup(signals=signals, seconds=seconds, num_bytes=num_bytes))

        # The callback runs on a thread of Ray's; the pipeline's thread does the rest.
        account.future().add_done_callback(lambda done: self._post(lambda: finished(done)))
