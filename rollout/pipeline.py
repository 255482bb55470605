"""The background pipeline: prompts -> rollouts -> teacher signals -> full batches, ahead of the trainer by a bound.

One thread runs every callback, so nothing here is locked but the hand-over to the trainer.

| waits for | consumes | produces | unblocked by |
|---|---|---|---|
| the window (trained version + max_staleness) | step plans | prompts in flight | `release` |
| rollouts of a scoring group | rollouts | groups at the teacher | a sequence that finishes |
| groups of a step | signals, rewards | a scored batch | the teacher, the reward function |
| `take` (the trainer) | scored batches | | the pipeline |

Staleness is bounded by construction: step s is dispatched once version s - 1 - max_staleness is published, so the
weights that begin a sample are at most max_staleness optimizer steps older than those it trains.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gkd.interfaces import GroupKey, Rewards, ScoredBatch, ScoredGroup, Teachers
from gkd.types import Rollout, SampleId
from rollout.mixer import StepPlan
from rollout.stages import StagedMixer, StagedRollouts

_STOP_CHECK_S = 0.2
"""How often whoever waits for a batch looks whether the run is to stop."""


@dataclass(slots=True)
class _Assembly:
    """A step that is being put together."""

    plan: StepPlan
    started: float
    group_of: dict[SampleId, int]
    rollouts: dict[SampleId, Rollout] = field(default_factory=dict)
    missing: list[int] = field(default_factory=list)
    """Per group, members that have not finished."""
    scored: dict[int, ScoredGroup] = field(default_factory=dict)
    rewarded: dict[int, Sequence[float] | None] = field(default_factory=dict)
    rollout_s: float = 0.0


class Pipeline:
    """Runs ahead of the trainer within the staleness bound; nothing that finished is thrown away."""

    def __init__(
        self,
        mixer: StagedMixer,
        rollouts: StagedRollouts,
        teachers: Teachers,
        rewards: Rewards,
        *,
        first_step: int,
        last_step: int,
        max_staleness: int,
        timeout_s: float,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        """Plan steps `first_step` to `last_step`; give up if nothing finishes for `timeout_s` seconds.

        `stop_requested` says whether the user asked to stop: then nobody is kept waiting for a batch.
        """
        self._mixer = mixer
        self._rollouts = rollouts
        self._teachers = teachers
        self._rewards = rewards
        self._next_step = first_step
        self._last_step = last_step
        self._max_staleness = max_staleness
        self._timeout_s = timeout_s
        self._stop_requested = stop_requested
        self._progress_at = time.monotonic()
        self._callbacks: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._assemblies: dict[int, _Assembly] = {}
        self._step_of: dict[SampleId, int] = {}
        self._ready: queue.Queue[ScoredBatch | BaseException] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="pipeline", daemon=True)
        rollouts.connect(self._callbacks.put, self._rollout_finished)
        teachers.connect(self._callbacks.put, self._group_scored)
        rewards.connect(self._callbacks.put, self._group_rewarded)

    def __enter__(self) -> "Pipeline":
        self._idle_s = self._idle()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._callbacks.put(None)
        self._thread.join()

    def release(self, version: int) -> None:
        """Version `version` is published: let the prompts of later steps go."""
        self._callbacks.put(lambda: self._dispatch(version))

    def fail(self, error: BaseException) -> None:
        """Something outside ended: whoever waits in `take` is told."""

        def end() -> None:
            raise error

        self._callbacks.put(end)

    def take(self) -> ScoredBatch | None:
        """The next step's batch, in step order; None once the user asked to stop. Blocks.

        Raises:
            TimeoutError: if no worker finished anything for `timeout_s`.
            Exception: whatever ended a worker.
        """
        batch: ScoredBatch | BaseException | None = None
        while batch is None and not self._stop_requested():
            with contextlib.suppress(queue.Empty):
                batch = self._ready.get(timeout=_STOP_CHECK_S)
        if isinstance(batch, BaseException):
            raise batch
        return batch

    def _run(self) -> None:
        try:
            while (callback := self._next_callback()) is not None:
                callback()
        except BaseException as error:  # handed to the trainer's thread, which raises it from `take`
            self._ready.put(error)

    def _next_callback(self) -> Callable[[], None] | None:
        """Waits without end while no work is out, else until nothing has finished for too long."""
        remaining = self._progress_at + self._timeout_s - time.monotonic()
        try:
            return self._callbacks.get(timeout=max(0.0, remaining) if self._assemblies else None)
        except queue.Empty:
            raise TimeoutError(
                f"no rollout, teacher signal or reward finished in {self._timeout_s:g} s while steps "
                f"{sorted(self._assemblies)} were being made; {self._awaited()} (rollout.timeout_s sets this limit)"
            ) from None

    def _awaited(self) -> str:
        """What is not there yet."""
        assemblies = list(self._assemblies.values())
        rollouts = sum(sum(assembly.missing) for assembly in assemblies)
        complete = sum(assembly.missing.count(0) for assembly in assemblies)
        signals = complete - sum(len(assembly.scored) for assembly in assemblies)
        rewards = complete - sum(len(assembly.rewarded) for assembly in assemblies)
        return (
            f"awaited are {rollouts} rollouts, and of complete groups {signals} signals and {rewards} sets of rewards"
        )

    def _dispatch(self, version: int) -> None:
        self._progress_at = time.monotonic()
        while self._next_step <= min(version + 1 + self._max_staleness, self._last_step):
            plan = self._mixer.plan(self._next_step)
            self._next_step += 1
            group_of = {sample: number for number, group in enumerate(plan.groups) for sample in group}
            self._assemblies[plan.step] = _Assembly(
                plan, time.perf_counter(), group_of, missing=[len(group) for group in plan.groups]
            )
            self._step_of |= dict.fromkeys(group_of, plan.step)
            self._rollouts.submit(plan.step, plan.on_policy)
            for rollout in plan.off_policy:
                self._rollout_finished(rollout)

    def _rollout_finished(self, rollout: Rollout) -> None:
        self._progress_at = time.monotonic()
        step = self._step_of.pop(rollout.id)
        assembly = self._assemblies[step]
        assembly.rollouts[rollout.id] = rollout
        if rollout.source != "dataset":
            assembly.rollout_s = time.perf_counter() - assembly.started
        group = assembly.group_of[rollout.id]
        assembly.missing[group] -= 1
        if assembly.missing[group] == 0:
            members: Sequence[Rollout] = [assembly.rollouts[sample] for sample in assembly.plan.groups[group]]
            self._teachers.submit((step, group), members)
            self._rewards.submit((step, group), members)

    def _group_scored(self, key: GroupKey, scored: ScoredGroup) -> None:
        step, group = key
        self._assemblies[step].scored[group] = scored
        self._group_finished()

    def _group_rewarded(self, key: GroupKey, rewards: Sequence[float] | None) -> None:
        step, group = key
        self._assemblies[step].rewarded[group] = rewards
        self._group_finished()

    def _group_finished(self) -> None:
        self._progress_at = time.monotonic()
        # Batches leave in step order: a later step that is complete waits for the earlier one.
        while self._assemblies and self._is_complete(first := min(self._assemblies)):
            self._ready.put(self._finish(self._assemblies.pop(first)))

    def _is_complete(self, step: int) -> bool:
        assembly = self._assemblies[step]
        return len(assembly.scored) == len(assembly.rewarded) == len(assembly.plan.groups)

    def _finish(self, assembly: _Assembly) -> ScoredBatch:
        scored = [assembly.scored[group] for group in range(len(assembly.plan.groups))]
        before, self._idle_s = self._idle_s, self._idle()
        return ScoredBatch(
            step=assembly.plan.step,
            stage=assembly.plan.stage,
            rollouts=tuple(assembly.rollouts[sample] for sample in assembly.plan.samples),
            groups=assembly.plan.groups,
            signals=tuple(group.signals for group in scored),
            rollout_s=assembly.rollout_s,
            teacher_s=sum(group.seconds for group in scored),
            rollout_wait_s=self._idle_s[0] - before[0],
            teacher_wait_s=self._idle_s[1] - before[1],
            reward_wait_s=self._idle_s[2] - before[2],
            signal_bytes=sum(group.num_bytes for group in scored),
            num_looked_up=sum(group.num_looked_up for group in scored),
            num_found=sum(group.num_found for group in scored),
            rewards=_in_order(assembly),
        )

    def _idle(self) -> tuple[float, float, float]:
        """How long the engines, the teachers and the reward function have had nothing to do so far."""
        return self._rollouts.idle_s(), self._teachers.idle_s(), self._rewards.idle_s()


def _in_order(assembly: _Assembly) -> tuple[float, ...] | None:
    """The rewards of a complete step in the order of its samples; None where there are none."""
    found: dict[SampleId, float] = {}
    for number, group in enumerate(assembly.plan.groups):
        rewards = assembly.rewarded[number]
        if rewards is None:
            return None
        found |= zip(group, rewards, strict=True)
    return tuple(found[sample] for sample in assembly.plan.samples)


class NoTeacher:
    """In the teachers' place where the objective needs none: every group is scored at once, with nothing."""

    def connect(self, post: object, deliver: Callable[[GroupKey, ScoredGroup], None]) -> None:
        """Only `deliver` matters: groups are submitted on the pipeline's thread."""
        self._deliver = deliver

    def submit(self, key: GroupKey, rollouts: Sequence[Rollout]) -> None:
        """Deliver an empty signal."""
        self._deliver(key, ScoredGroup(signals=None, seconds=0.0, num_bytes=0))

    def idle_s(self) -> float:
        """There is nobody to wait."""
        return 0.0


class NoRewards:
    """In the reward function's place where there is none."""

    def connect(self, post: object, deliver: Callable[[GroupKey, Sequence[float] | None], None]) -> None:
        """Only `deliver` matters: groups are submitted on the pipeline's thread."""
        self._deliver = deliver

    def submit(self, key: GroupKey, rollouts: Sequence[Rollout]) -> None:
        """Deliver no rewards."""
        self._deliver(key, None)

    def idle_s(self) -> float:
        """There is nobody to wait."""
        return 0.0


class NoRollouts:
    """In the engines' place where every sample is the dataset's."""

    def connect(self, post: object, deliver: object) -> None:
        """Nothing will be delivered."""

    def submit(self, prompts: Sequence[object]) -> None:
        """Never called: no plan has on-policy prompts."""
        raise AssertionError("no rollout engine was started, yet a step has on-policy prompts")

    def idle_s(self) -> float:
        """There is nobody to wait."""
        return 0.0
