"""What the parts ask of each other. `rollout` and `trainer` meet only here; `launch` gives each what it needs."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from gkd.types import Prompt, Rollout, SampleId

SignalRef = Any
"""A handle to the signals of a scoring group, in whatever store the workers share; only the trainer opens it."""

GroupKey = tuple[int, int]
"""(optimizer step, number of the scoring group in it)."""

WeightUpdate = Any
"""A message of a weight sender to the receivers, one a bucket: opaque to everyone between."""


class WeightSender(Protocol):
    """The trainer's end of a wire. Built inside the process of the trainer's rank 0, from an import path."""

    def open(self, workers: Sequence[int], modules: Collection[str]) -> list[dict[str, Any]]:
        """What each engine needs to know to be connected.

        Args:
            workers: per engine, the number of its workers (GPUs).
            modules: the last parts of the names of the modules that the engines' models hold.
        """
        ...

    def connect(self) -> None:
        """Connect, while every engine does so with what `open` made. Blocks until all have."""
        ...

    def send(self, weights: Iterable[tuple[str, torch.Tensor]], tied: dict[str, str]) -> Iterator[WeightUpdate]:
        """Send every tensor, packed; yields one message a bucket for the receivers.

        Some wires move a bucket when the message after its own is asked for: whoever hands out a message asks for the
        next one at once, and hands that out when all receivers are done with the one before.

        Args:
            weights: checkpoint name and tensor, each tensor once.
            tied: alias -> name of the tensor it shares, for receivers that hold the alias as a module of its own.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    """Signals of one scoring group."""

    signals: SignalRef
    """Handle to a list of signals, one per rollout of the group, in order."""
    seconds: float
    """How long the teacher worked on it."""
    num_bytes: int
    """Size of the signals."""
    num_looked_up: int = 0
    """Signals that may have been in a teacher's cache: those of given text, where there is a cache."""
    num_found: int = 0
    """How many of those were, and cost the teacher nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredBatch:
    """Everything one optimizer step needs."""

    step: int
    """The optimizer step, from 1."""
    rollouts: tuple[Rollout, ...]
    """In the order of the plan."""
    groups: tuple[tuple[SampleId, ...], ...]
    """Which samples were scored together."""
    signals: tuple[SignalRef | None, ...]
    """One handle per group; None where no teacher is asked."""
    rollout_s: float
    """From dispatch to the last rollout; 0 where no engine wrote any."""
    teacher_s: float
    """Working time of the teacher on these groups."""
    rollout_wait_s: float
    """How long the engines that write in this stage had nothing to do since the batch before, on average."""
    teacher_wait_s: float
    """How long the teachers had nothing to do since the batch before, on average."""
    signal_bytes: int
    """Size of the signals."""
    num_looked_up: int = 0
    """As `ScoredGroup.num_looked_up`."""
    num_found: int = 0
    """As `ScoredGroup.num_found`."""
    rewards: tuple[float, ...] | None = None
    """One per rollout, in their order; None where there is no reward function."""
    reward_wait_s: float = 0.0
    """How long the reward function had nothing to do since the batch before."""
    stage: int = 0
    """The stage of the run that the step is in, from 0."""

    def without_signals(self) -> "ScoredBatch":
        """The batch once it is trained on: its signals may be freed."""
        return replace(self, signals=())


@dataclass(frozen=True, slots=True)
class MixedSignals:
    """A `SignalRef` for a group that several teachers scored, whose mixture is the teacher."""

    signals: tuple[SignalRef, ...]
    """A handle from each teacher."""
    weights: tuple[float, ...]
    """Of each teacher's distribution: positive, and 1 in sum."""


Post = Callable[[Callable[[], None]], None]
"""Hands a callback from any thread to the pipeline's own thread, which runs it. An error it raises ends the run."""


class Rollouts(Protocol):
    """Engines that write responses, as the pipeline sees them: the student's, or the teacher's."""

    def connect(self, post: Post, deliver: Callable[[Rollout], None]) -> None:
        """Say where finished rollouts go: `deliver` is called through `post`, once for each."""
        ...

    def submit(self, prompts: Sequence[Prompt]) -> None:
        """Start generating; rollouts are delivered one by one as they finish."""
        ...

    def idle_s(self) -> float:
        """How long the engines have had nothing to do so far, in seconds, on average."""
        ...


class Rewards(Protocol):
    """The reward function, as the pipeline sees it."""

    def connect(self, post: Post, deliver: Callable[[GroupKey, Sequence[float] | None], None]) -> None:
        """Say where rewards go: `deliver` is called through `post` or from `submit`, once for each group."""
        ...

    def submit(self, key: GroupKey, rollouts: Sequence[Rollout]) -> None:
        """Reward a group of rollouts; delivered under the same key when done, one number each, or None for none."""
        ...

    def idle_s(self) -> float:
        """How long the reward function has had nothing to do so far, in seconds."""
        ...


class WeightReceivers(Protocol):
    """The rollout engines, as the weight sync sees them."""

    def update_weights(self, version: int, messages: Iterator[WeightUpdate]) -> None:
        """Load a version between two engine steps. Blocks until every engine has it."""
        ...

    def probe(self) -> Sequence[Rollout]:
        """A short generation from the current weights, with log-probabilities, for the served = trained proof."""
        ...


class Answers(Protocol):
    """The rollout engines, as evaluation sees them."""

    def answer(self, prompts: Sequence[Prompt], *, temperature: float) -> Sequence[Rollout]:
        """Responses from the current weights, in the prompts' order; 0 is greedy."""
        ...


class Scores(Protocol):
    """The teachers, as evaluation sees them."""

    def score_now(self, groups: Sequence[Sequence[Rollout]]) -> Sequence[SignalRef]:
        """A handle to the signals of each group. Blocks until all are scored."""
        ...


class Teachers(Protocol):
    """The teacher workers, as the pipeline sees them."""

    def connect(self, post: Post, deliver: Callable[[GroupKey, ScoredGroup], None]) -> None:
        """Say where scored groups go: `deliver` is called through `post`, once for each."""
        ...

    def submit(self, key: GroupKey, rollouts: Sequence[Rollout]) -> None:
        """Score a group of rollouts; delivered under the same key when done."""
        ...

    def idle_s(self) -> float:
        """How long the teachers have had nothing to do so far, in seconds, on average."""
        ...
