"""Weights from the trainer to the rollout engines, and the proof that the engines serve what was trained."""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from gkd.interfaces import WeightReceivers, WeightUpdate
from gkd.trace import Lane
from gkd.types import Rollout


class WeightGapError(RuntimeError):
    """The rollout engine does not serve the trained weights."""


class Publisher(Protocol):
    """The trainer, as the weight sync sees it."""

    def publish(self) -> Iterator[WeightUpdate]:
        """The current weights, one message a bucket."""
        ...

    def sent_bytes(self) -> int:
        """Bytes of weights in the last `publish`."""
        ...

    def logprobs(self, rollouts: Sequence[Rollout]) -> list[list[float]]:
        """Log-probabilities of responses under the current weights."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """What one sync measured."""

    version: int
    """The version that is now current."""
    seconds: float
    """From reading the weights to the end of the proof."""
    num_bytes: int
    """Bytes of weights that travelled."""
    logprob_gap_max: float | None
    """Largest |log p(engine) - log p(trainer)| on the probe, in nats; None where no engine runs."""


Served = Callable[[int], None]
"""Told the version that the engines serve from now on."""


class Sync(Protocol):
    """Brings the rollout engines to a version."""

    def push(self, version: int, served: Served) -> SyncReport:
        """Publish and prove; `served` is told as soon as prompts may go to the engines."""
        ...


class WeightSync:
    """Publishes a version and proves it: after every sync the engine generates a probe that the trainer scores."""

    def __init__(
        self,
        trainer: Publisher,
        engines: WeightReceivers,
        lane: Lane,
        *,
        due: Callable[[int], bool],
        max_gap: float | None,
        on_gap: Callable[[str], None],
    ) -> None:
        """Set up.

        Args:
            trainer: sends.
            engines: receive.
            lane: where the sync records what it does.
            due: whether a version is to be pushed; the first one always is.
            max_gap: in nats; None only measures.
            on_gap: told of a larger gap: it raises, or warns.
        """
        self._trainer = trainer
        self._engines = engines
        self._lane = lane
        self._due = due
        self._max_gap = max_gap
        self._on_gap = on_gap
        self._version: int | None = None

    def push(self, version: int, served: Served) -> SyncReport:
        """Bring every engine to the current weights, if a sync is due.

        Raises:
            WeightGapError: if the engine's log-probabilities are not the trainer's.
        """
        if self._version is not None and not self._due(version):
            return SyncReport(version=self._version, seconds=0.0, num_bytes=0, logprob_gap_max=None)
        with self._lane.span("sync", version=version) as syncing:
            with self._lane.span("transfer"):
                self._engines.update_weights(version, self._trainer.publish())
            with self._lane.span("probe"):
                probe = self._engines.probe()
            # The probe is generated: from here on the engines are free, while the trainer scores it.
            served(version)
            self._version = version
            with self._lane.span("proof"):
                gap = self._gap(probe)
        if self._max_gap is not None and not gap <= self._max_gap:
            self._on_gap(
                f"after the sync of version {version} the rollout engine's log-probabilities differ from the "
                f"trainer's by up to {gap:.3g} nats (sync.max_logprob_gap = {self._max_gap:g}): rollouts would not "
                "come from the weights they claim. Usual causes: a weight that the engine did not take over (a tied "
                "head, a renamed tensor), or a precision that differs between the two."
            )
        return SyncReport(
            version=version,
            seconds=syncing.seconds,
            num_bytes=self._trainer.sent_bytes(),
            logprob_gap_max=gap,
        )

    def _gap(self, probe: Sequence[Rollout]) -> float:
        trained = self._trainer.logprobs(probe)
        gap = 0.0
        for rollout, logprobs in zip(probe, trained, strict=True):
            assert rollout.logprobs is not None and len(rollout.logprobs) == len(logprobs) > 0
            for served, own in zip(rollout.logprobs, logprobs, strict=True):
                difference = abs(served - own)
                gap = math.inf if math.isnan(difference) else max(gap, difference)
        return gap


def stop_the_run(message: str) -> None:
    """What a gap does in float32, where it can only be a mistake.

    Raises:
        WeightGapError: always.
    """
    raise WeightGapError(message)


class NoSync:
    """In the sync's place where no rollout engine runs."""

    def push(self, version: int, served: Served) -> SyncReport:
        """The version advances; nothing moves."""
        served(version)
        return SyncReport(version=version, seconds=0.0, num_bytes=0, logprob_gap_max=None)


class AwaitedSync:
    """The sync where training samples do not wait for every version, because the engines only answer held-out prompts
    for a while, or all the time."""

    def __init__(self, sync: WeightSync, awaited: Callable[[int], bool]) -> None:
        """`awaited` says whether any step that a version lets go is trained on samples of the student."""
        self._sync = sync
        self._awaited = awaited

    def push(self, version: int, served: Served) -> SyncReport:
        """If no sample waits for the version, training goes on at once; the engines may get it for an evaluation."""
        if self._awaited(version):
            return self._sync.push(version, served)
        served(version)
        report = self._sync.push(version, lambda _: None)
        return replace(report, version=version)


class BackgroundPush:
    """A push that goes on while the caller waits for the next batch: `with BackgroundPush(...) as push: take()`.

    On leaving, the push has ended; if it failed, its error is raised. `failed` is told of an error at once, so that
    whoever waits for the engines does not wait in vain.
    """

    def __init__(self, sync: Sync, version: int, *, served: Served, failed: Callable[[BaseException], None]) -> None:
        self._sync = sync
        self._version = version
        self._served = served
        self._failed = failed
        self._error: BaseException | None = None
        self._report: SyncReport | None = None
        self._thread = threading.Thread(target=self._run, name="push", daemon=True)

    def __enter__(self) -> "BackgroundPush":
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            return  # the run ends with an error of its own: whoever waits for workers that hang waits no longer
        self._thread.join()
        if self._error is not None:
            raise self._error

    @property
    def report(self) -> SyncReport:
        """What it measured; once the push has ended."""
        assert self._report is not None, "the push has not ended"
        return self._report

    def _run(self) -> None:
        try:
            self._report = self._sync.push(self._version, self._served)
        except BaseException as error:  # raised again by whoever waits: `take` through `failed`, or `__exit__`
            self._error = error
            self._failed(error)
