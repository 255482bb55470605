"""Ray around the reward function: a thin actor, and the driver's handle on it.

A process of its own, because the function is the user's: it may hold the interpreter for long, which in a thread of the
driver would hold up the pipeline; it may set signals (as timers of answer checkers do), which works in a main thread
alone; and it can be ended when it never returns.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import ray

from gkd.interfaces import GroupKey, Post
from gkd.stages import ByStep
from gkd.trace import Lane, TracedWorker
from gkd.types import Rollout
from rollout.idle import IdleClock
from rollout.rewards import RewardScorer, RewardSettings

_GROUPS_AHEAD = 2
"""Groups queued at the actor: it goes on while the driver handles the group before."""


@ray.remote
class RewardActor(TracedWorker):
    """Holds the reward function."""

    def __init__(self, settings: RewardSettings) -> None:
        super().__init__(Lane())
        self._scorer = RewardScorer(settings)

    def ready(self) -> bool:
        """Returns once the function is loaded."""
        return True

    def score(self, rollouts: Sequence[Rollout], references: Sequence[str | None]) -> list[float]:
        """The reward of each rollout."""
        with self._lane.span("reward", samples=len(rollouts)):
            return self._scorer.score(rollouts, references)


class RewardPool:
    """The driver's handle on the reward worker (`gkd.interfaces.Rewards`)."""

    def __init__(self, actor: Any, *, references: ByStep[Sequence[str | None]]) -> None:
        """`references` are the final answers of each stage's training records, by `prompt_index`."""
        self._actor = actor
        self._references = references
        self._waiting: deque[tuple[GroupKey, list[Rollout]]] = deque()
        self._num_calls = 0
        self._clock = IdleClock()

    def connect(self, post: Post, deliver: Callable[[GroupKey, Sequence[float] | None], None]) -> None:
        """Say where rewards go."""
        self._post = post
        self._deliver = deliver

    def submit(self, key: GroupKey, rollouts: Sequence[Rollout]) -> None:
        """Reward a group."""
        self._waiting.append((key, list(rollouts)))
        self._hand_out()

    def idle_s(self) -> float:
        """How long the reward function has had nothing to do so far, in seconds."""
        return self._clock.read()

    def _hand_out(self) -> None:
        while self._waiting and self._num_calls < _GROUPS_AHEAD:
            self._call(*self._waiting.popleft())

    def _call(self, key: GroupKey, rollouts: list[Rollout]) -> None:
        self._num_calls += 1
        self._clock.work()
        of_records = self._references.at(key[0]).value
        references = [of_records[rollout.id.prompt_index] for rollout in rollouts]

        def finished(call: "Future[list[float]]") -> None:
            self._num_calls -= 1
            self._hand_out()
            if self._num_calls == 0:
                self._clock.rest()
            self._deliver(key, call.result())

        # The callback runs on a thread of Ray's; the pipeline's thread does the rest.
        future = self._actor.score.remote(rollouts, references).future()
        future.add_done_callback(lambda done: self._post(lambda: finished(done)))
