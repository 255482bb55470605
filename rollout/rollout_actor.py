"""Ray around the vLLM generator: a thin actor, and the driver's handle on all of them."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from itertools import groupby
from typing import Any

import ray

from gkd.interfaces import Post, WeightUpdate
from gkd.trace import Lane, TracedWorker
from gkd.types import Prompt, Rollout
from rollout.idle import IdleClock
from rollout.vllm_generator import GeneratorSettings, VllmGenerator

_STEPS_PER_CALL = 16
"""Engine steps after which a call returns even if nothing finished, so that a weight update need not wait longer."""
_CALLS_AHEAD = 2
"""Calls queued at an actor: the engine goes on while the driver handles what the call before returned."""


@ray.remote
class RolloutActor(TracedWorker):
    """Holds one engine. Ray runs its calls one after the other, so weights change exactly between two engine steps."""

    def __init__(self, settings: GeneratorSettings) -> None:
        super().__init__(Lane())
        self._generator = VllmGenerator(settings)

    def ready(self) -> bool:
        """Returns once the engine is up."""
        return True

    def advance(self, prompts: Sequence[Prompt], temperature: float | None = None) -> list[Rollout]:
        """Take in prompts, then step the engine until something finishes or a few steps have passed."""
        self._generator.add(prompts, temperature=temperature)
        finished: list[Rollout] = []
        # A weight update is several calls, and this one may come between them.
        if self._generator.updating or not self._generator.num_unfinished:
            return finished
        with self._lane.span("generate", joins=True, steps=0, finished=0) as span:
            while self._generator.num_unfinished and not finished and span.facts["steps"] < _STEPS_PER_CALL:
                finished = self._generator.step()
                span.facts["steps"] += 1
            span.facts["finished"] = len(finished)
        return finished

    def answer(self, prompts: Sequence[Prompt], temperature: float) -> list[Rollout]:
        """Answers to some prompts from the current weights, beside whatever else is being generated."""
        with self._lane.span("answer", prompts=len(prompts)):
            return self._generator.answer(prompts, temperature=temperature)

    def held_modules(self) -> tuple[str, ...]:
        """What the engine's model consists of."""
        return self._generator.held_modules()

    def connect_weights(self, info: dict[str, Any]) -> None:
        """Join the wire that brings the weights."""
        self._generator.connect_weights(info)

    def start_update(self) -> None:
        """New weights come."""
        self._update = self._lane.span("weight update").begin()
        self._generator.start_update()

    def load_update(self, update: WeightUpdate) -> None:
        """Load one bucket of them; the bucket arrives through the object store, without a copy."""
        with self._lane.span("load bucket"):
            self._generator.load_update(update)

    def finish_update(self, version: int) -> None:
        """They are complete."""
        with self._lane.span("finish update"):
            self._generator.finish_update(version)
        self._update.facts["version"] = version
        self._update.end()

    def probe(self) -> list[Rollout]:
        """Short rollouts with log-probabilities."""
        with self._lane.span("probe"):
            return self._generator.probe()


class _Engine:
    """What the driver knows of one engine."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.num_in_flight = 0
        self.num_calls = 0
        self.clock = IdleClock()


class RolloutPool:
    """The driver's handle on the rollout engines (`gkd.interfaces.Rollouts`). Work goes to whoever has least of it."""

    def __init__(self, actors: Sequence[Any], *, max_concurrent: int, timeout_s: float) -> None:
        """`max_concurrent` is how many sequences one engine generates at once."""
        self._engines = [_Engine(actor) for actor in actors]
        # What an engine cannot start yet waits here for whoever is free first. A single engine queues as well itself,
        # and then takes the same steps in every run.
        self._room = max_concurrent if len(self._engines) > 1 else 2**31
        self._waiting: deque[list[Prompt]] = deque()
        self._timeout_s = timeout_s
        self._updating = False
        self._post: Post = lambda callback: callback()  # until a pipeline connects there is nothing in flight

    def connect(self, post: Post, deliver: Callable[[Rollout], None]) -> None:
        """Say where finished rollouts go."""
        self._post = post
        self._deliver = deliver

    def submit(self, prompts: Sequence[Prompt]) -> None:
        """Start generating. Samples of one prompt stay together: they share its keys and values in one engine."""
        for _, samples in groupby(prompts, key=lambda prompt: (prompt.id.epoch, prompt.id.prompt_index)):
            self._waiting.append(list(samples))
        self._hand_out()

    def idle_s(self) -> float:
        """How long the engines have had nothing to do so far, in seconds, on average."""
        return sum(engine.clock.read() for engine in self._engines) / len(self._engines)

    def update_weights(self, version: int, messages: Iterator[Any]) -> None:
        """Load a version, its buckets arriving while the ones before are loaded; returns when every engine has it."""
        self._updating = True
        self._on_all("start_update")
        loading: list[Any] = []
        try:
            for message in messages:  # asked for while the engines load the one before
                ray.get(loading, timeout=self._timeout_s)
                loading = [engine.actor.load_update.remote(message) for engine in self._engines]
        except TimeoutError:
            ray.get(loading, timeout=self._timeout_s)  # an engine that failed is why the sender waits in vain
            raise
        ray.get(loading, timeout=self._timeout_s)
        self._on_all("finish_update", version)
        self._updating = False
        self._post(self._resume)

    def probe(self) -> list[Rollout]:
        """Short rollouts with log-probabilities, from every engine."""
        return [rollout for rollouts in self._on_all("probe") for rollout in rollouts]

    def answer(self, prompts: Sequence[Prompt], *, temperature: float) -> list[Rollout]:
        """Answers to held-out prompts from the current weights, in their order; training rollouts go on beside them."""
        actors = [engine.actor for engine in self._engines]
        parts = [prompts[i :: len(actors)] for i in range(len(actors))]
        calls = [actor.answer.remote(part, temperature) for actor, part in zip(actors, parts, strict=True) if part]
        answers = {r.id: r for rollouts in ray.get(calls, timeout=self._timeout_s) for r in rollouts}
        return [answers[prompt.id] for prompt in prompts]

    def _on_all(self, method: str, *args: Any) -> list[Any]:
        calls = [getattr(engine.actor, method).remote(*args) for engine in self._engines]
        return ray.get(calls, timeout=self._timeout_s)

    def _hand_out(self) -> None:
        """Give waiting prompts to the engine with the fewest in flight, while one has room."""
        given: dict[int, list[Prompt]] = {}
        while self._waiting:
            number = min(range(len(self._engines)), key=lambda n: self._engines[n].num_in_flight)
            if self._engines[number].num_in_flight >= self._room:
                break
            samples = self._waiting.popleft()
            self._engines[number].num_in_flight += len(samples)
            given.setdefault(number, []).extend(samples)
        for number, prompts in given.items():
            self._call(self._engines[number], prompts)

    def _call(self, engine: _Engine, prompts: Sequence[Prompt]) -> None:
        engine.num_calls += 1
        engine.clock.work()
        future = engine.actor.advance.remote(prompts).future()
        # The callback runs on a thread of Ray's, which must not block or call Ray: the pipeline's thread does the rest.
        future.add_done_callback(lambda done: self._post(lambda: self._finished(engine, done)))

    def _finished(self, engine: _Engine, call: "Future[list[Rollout]]") -> None:
        engine.num_calls -= 1
        rollouts = call.result()
        engine.num_in_flight -= len(rollouts)
        if rollouts:
            self._hand_out()
        self._keep_going(engine)
        if engine.num_in_flight == 0:
            engine.clock.rest()
        for rollout in rollouts:
            self._deliver(rollout)

    def _keep_going(self, engine: _Engine) -> None:
        """Keep calls queued at an engine that has work; during an update it would only be asked in vain."""
        while not self._updating and engine.num_calls < _CALLS_AHEAD and engine.num_in_flight > 0:
            self._call(engine, [])

    def _resume(self) -> None:
        for engine in self._engines:
            self._keep_going(engine)


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
