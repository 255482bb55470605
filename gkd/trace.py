"""What a worker does when, for the timeline that `log.trace` writes.

A process measures with its monotonic clock, and places that on its host's wall clock once, when recording starts. So no
clock that is set back makes intervals of a process overlap; lanes of one host agree to microseconds, those of several
hosts as well as their clocks do (milliseconds where NTP keeps them).
"""

import time
from collections import deque
from dataclasses import dataclass, field

_JOINED_WITHIN_NS = 10_000_000
"""Work that goes on after a shorter pause counts as one interval, where it may be joined: 10 ms."""


@dataclass(slots=True)
class Interval:
    """Something that a worker did."""

    name: str
    """What."""
    start_ns: int
    """When it began: nanoseconds since the epoch."""
    end_ns: int
    """When it ended."""
    facts: dict[str, float] = field(default_factory=dict)
    """Numbers about it."""


class Span:
    """One measurement: a context, or `begin` and `end`. It knows its seconds whether or not it is recorded."""

    def __init__(self, lane: "Lane", name: str, *, joins: bool, facts: dict[str, float]) -> None:
        self._lane = lane
        self._name = name
        self._joins = joins
        self.facts = facts
        """May be added to until the end."""
        self.seconds = 0.0
        """How long it took; once it has ended."""

    def begin(self) -> "Span":
        """Now."""
        self._start_ns = time.perf_counter_ns()
        return self

    def end(self) -> None:
        """Now."""
        end_ns = time.perf_counter_ns()
        self.seconds = (end_ns - self._start_ns) / 1e9
        self._lane.add(Interval(self._name, self._start_ns, end_ns, self.facts), joins=self._joins)

    def __enter__(self) -> "Span":
        return self.begin()

    def __exit__(self, *_: object) -> None:
        self.end()


class Lane:
    """What one worker, or one thread, did one thing after the other. Measures always; records between start and stop.

    Intervals stay here until they are taken, so whoever starts a recording takes them every now and then.
    """

    def __init__(self) -> None:
        self._recording = False
        self._epoch_ns = 0
        self._intervals: deque[Interval] = deque()

    def start(self) -> None:
        """Record from now on."""
        self._epoch_ns = time.time_ns() - time.perf_counter_ns()
        self._recording = True

    def stop(self) -> None:
        """Record no longer."""
        self._recording = False

    def span(self, name: str, *, joins: bool = False, **facts: float) -> Span:
        """Measure something: `with lane.span("train", step=3) as training: ...`, then `training.seconds`.

        Args:
            name: what it is.
            joins: whether what follows it under the same name within 10 ms is part of it, their facts added up.
            facts: numbers about it.
        """
        return Span(self, name, joins=joins, facts=facts)

    def add(self, interval: Interval, *, joins: bool) -> None:
        """Record an interval of the monotonic clock."""
        if not self._recording:
            return
        interval.start_ns += self._epoch_ns
        interval.end_ns += self._epoch_ns
        last = self._intervals[-1] if joins and self._intervals else None
        if last and last.name == interval.name and interval.start_ns - last.end_ns < _JOINED_WITHIN_NS:
            last.end_ns = interval.end_ns
            last.facts = {key: last.facts[key] + value for key, value in interval.facts.items()}
        else:
            self._intervals.append(interval)

    def take(self) -> list[Interval]:
        """What ended since the last time. May be called from another thread than the one that records."""
        return [self._intervals.popleft() for _ in range(len(self._intervals))]


class TracedWorker:
    """What an actor answers to whoever writes the timeline."""

    def __init__(self, lane: Lane) -> None:
        """`lane` is where the actor records."""
        self._lane = lane

    def start_trace(self) -> None:
        """Record from now on."""
        self._lane.start()

    def take_intervals(self) -> list[Interval]:
        """What ended since the last time."""
        return self._lane.take()

    def stop_trace(self) -> list[Interval]:
        """Record no longer; what ended since the last time."""
        self._lane.stop()
        return self._lane.take()
