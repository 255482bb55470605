"""Ray around the vLLM generator: a thin actor, and the driver's handle on it."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import ray

from gkd.interfaces import Post, WeightBuckets
from gkd.types import Prompt, Rollout
from rollout.vllm_generator import GeneratorSettings, VllmGenerator

_STEPS_PER_CALL = 16
"""Engine steps after which a call returns even if nothing finished, so that a weight update need not wait longer."""
_CALLS_AHEAD = 2
"""Calls queued at the actor: the engine goes on while the driver handles what the call before returned."""


@ray.remote
class RolloutActor:
    """Holds one engine. Ray runs its calls one after the other, so weights change exactly between two engine steps."""

    def __init__(self, settings: GeneratorSettings) -> None:
        self._generator = VllmGenerator(settings)

    def ready(self) -> bool:
        """Returns once the engine is up."""
        return True

    def advance(self, prompts: Sequence[Prompt], temperature: float | None = None) -> list[Rollout]:
        """Take in prompts, then step the engine until something finishes or a few steps have passed."""
        self._generator.add(prompts, temperature=temperature)
        finished: list[Rollout] = []
        steps = 0
        while self._generator.num_unfinished and not finished and steps < _STEPS_PER_CALL:
            finished = self._generator.step()
            steps += 1
        return finished

    def update_weights(self, weights: WeightBuckets) -> None:
        """Load new weights between two engine steps."""
        self._generator.update_weights(weights)

    def probe(self) -> list[Rollout]:
        """Short rollouts with log-probabilities."""
        return self._generator.probe()


class RolloutPool:
    """The driver's handle on the rollout engine (`gkd.interfaces.Rollouts`)."""

    def __init__(self, actor: Any, *, timeout_s: float) -> None:
        self._actor = actor
        self._timeout_s = timeout_s
        self._num_in_flight = 0
        self._num_calls = 0

    def connect(self, post: Post, deliver: Callable[[Rollout], None]) -> None:
        """Say where finished rollouts go."""
        self._post = post
        self._deliver = deliver

    def submit(self, prompts: Sequence[Prompt]) -> None:
        """Start generating."""
        self._num_in_flight += len(prompts)
        self._call(prompts)

    def update_weights(self, weights: WeightBuckets) -> None:
        """Load new weights; returns when the engine has them."""
        ray.get(self._actor.update_weights.remote(weights), timeout=self._timeout_s)

    def probe(self) -> list[Rollout]:
        """Short rollouts with log-probabilities."""
        return ray.get(self._actor.probe.remote(), timeout=self._timeout_s)

    def _call(self, prompts: Sequence[Prompt]) -> None:
        self._num_calls += 1
        future = self._actor.advance.remote(prompts).future()
        # The callback runs on a thread of Ray's, which must not block or call Ray: the pipeline's thread does the rest.
        future.add_done_callback(lambda done: self._post(lambda: self._finished(done)))

    def _finished(self, call: "Future[list[Rollout]]") -> None:
        self._num_calls -= 1
        rollouts = call.result()
        self._num_in_flight -= len(rollouts)
        while self._num_calls < _CALLS_AHEAD and self._num_in_flight > 0:
            self._call([])
        for rollout in rollouts:
            self._deliver(rollout)


def generate(actor: Any, prompts: Sequence[Prompt], *, temperature: float, timeout_s: float) -> list[Rollout]:
    """All rollouts of some prompts, in the prompts' order; for evaluation, where nothing else runs.

    Raises:
        TimeoutError: if nothing finishes for `timeout_s` seconds.
    """
    finished: dict[Any, Rollout] = {}
    waiting: Sequence[Prompt] = prompts
    progress_at = time.monotonic()
    while len(finished) < len(prompts):
        call = actor.advance.remote(waiting, temperature)
        waiting = []
        arrived = ray.get(call, timeout=timeout_s)
        finished |= {rollout.id: rollout for rollout in arrived}
        progress_at = time.monotonic() if arrived else progress_at
        if time.monotonic() - progress_at > timeout_s:
            raise TimeoutError(f"no rollout finished in {timeout_s:g} s")
    return [finished[prompt.id] for prompt in prompts]
