"""`log.trace`: what all workers of a run do when, as lanes of a timeline in `trace.json`.

Each worker records its own intervals (`gkd.trace`). After every step the driver asks for them, does not wait for the
answers, and writes those that came to what it asked for the step before: so workers hold the intervals of about a step,
and the driver holds none.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from gkd.errors import Interrupted
from gkd.trace import Interval, Lane
from launch.trace_file import TraceFile

_GROUPS = ("rollout", "teacher_rollout", "reward", "trainer")
"""Groups of lanes by their numbers, from 1; teachers come after them. A run that goes on finds its lanes by them."""
_LANES = 1000
"""Lane numbers of one group: Perfetto wants them to differ between groups."""
_FIRST_RANK = 10
"""Number of the first rank's lane in the trainer's group, after those of the driver."""

_LAST_ANSWERS_S = 30.0
"""How long the end of a run waits for what its workers recorded last."""


class NoTrace:
    """In the timeline's place where none is asked for."""

    def lane(self, name: str) -> Lane:
        """A lane that is not recorded."""
        return Lane()

    def follow(self, workers: Mapping[str, Sequence[Any]]) -> None:
        """Nobody is followed."""

    def show(self, metrics: dict[str, Any]) -> None:
        """Nothing to write."""

    def __enter__(self) -> "NoTrace":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a lane stands."""

    group: str
    group_number: int
    name: str
    number: int
    """Within the group."""

    @property
    def _thread(self) -> int:
        return _LANES * self.group_number + self.number

    def described(self) -> list[dict[str, Any]]:
        """The events that name it."""
        own = {"ph": "M", "pid": self.group_number, "tid": self._thread}
        return [
            own | {"name": "process_name", "args": {"name": self.group}},
            own | {"name": "process_sort_index", "args": {"sort_index": self.group_number}},
            own | {"name": "thread_name", "args": {"name": self.name}},
            own | {"name": "thread_sort_index", "args": {"sort_index": self.number}},
        ]

    def events(self, intervals: Iterable[Interval]) -> list[dict[str, Any]]:
        """Intervals as events. Whole microseconds, both ends rounded down: what is nested stays so."""
        # Of two that begin at once, viewers take the first for the outer one.
        return [
            {
                "name": each.name,
                "ph": "X",
                "ts": (start := each.start_ns // 1000),
                "dur": each.end_ns // 1000 - start,
                "pid": self.group_number,
                "tid": self._thread,
                "args": each.facts,
            }
            for each in sorted(intervals, key=lambda each: (each.start_ns, -each.end_ns))
        ]


@dataclass(slots=True)
class _Followed:
    """A worker, and the answer that is awaited from it."""

    place: _Place
    actor: Any
    asked: Any = None


class Trace:
    """Writes the timeline while it is open; shown each step's metrics, it takes that for the end of a step."""

    def __init__(self, path: Path, *, timeout_s: float) -> None:
        """`path` is a new file, or that of the run that goes on; the workers start within `timeout_s` seconds."""
        self._path = path
        self._timeout_s = timeout_s
        self._own: list[tuple[_Place, Lane]] = []
        self._followed: list[_Followed] = []

    def lane(self, name: str) -> Lane:
        """A lane of the driver's, in the trainer's group."""
        lane = Lane()
        self._own.append((_Place("trainer", _group_number("trainer", []), name, len(self._own)), lane))
        return lane

    def follow(self, workers: Mapping[str, Sequence[Any]]) -> None:
        """Actors (`gkd.trace.TracedWorker`) by what they are called, such as `rollout` or `teacher math`."""
        teachers = [worker for worker in workers if worker not in _GROUPS]
        for worker, actors in workers.items():
            first, name = (_FIRST_RANK, "rank") if worker == "trainer" else (0, worker)
            number = _group_number(worker, teachers)
            self._followed += [
                _Followed(_Place(worker, number, f"{name} {i}", first + i), actor) for i, actor in enumerate(actors)
            ]

    def __enter__(self) -> "Trace":
        self._file = TraceFile(self._path)
        places = [place for place, _ in self._own] + [worker.place for worker in self._followed]
        self._file.append(event for place in places for event in place.described())
        ray.get([worker.actor.start_trace.remote() for worker in self._followed], timeout=self._timeout_s)
        for _, lane in self._own:
            lane.start()
        return self

    def show(self, metrics: dict[str, Any]) -> None:
        """A step is over: write what is known, and ask the workers."""
        self._write_own()
        for worker in self._followed:
            if self._has_answered(worker):
                worker.asked = worker.actor.take_intervals.remote()

    def __exit__(self, *raised: object) -> None:
        """Write the rest. Of a run that fails only what is here: its workers may be gone."""
        self._write_own()
        if raised[0] in (None, Interrupted):
            self._write_rest()
        self._file.close()

    def _write_own(self) -> None:
        for place, lane in self._own:
            self._file.append(place.events(lane.take()))

    def _write_rest(self) -> None:
        """The workers' last answers, but of those that do not answer, such as a reward function that never returns."""
        calls = [
            (worker, call) for worker in self._followed for call in (worker.asked, worker.actor.stop_trace.remote())
        ]
        awaited = [(worker.place, call) for worker, call in calls if call is not None]
        ready, _ = ray.wait([call for _, call in awaited], num_returns=len(awaited), timeout=_LAST_ANSWERS_S)
        for place, call in awaited:
            if call in ready:
                self._file.append(place.events(ray.get(call)))

    def _has_answered(self, worker: _Followed) -> bool:
        """Whether the worker owes no answer; one that has come is written."""
        if worker.asked is None:
            return True
        ready, _ = ray.wait([worker.asked], timeout=0)
        for answer in ready:
            self._file.append(worker.place.events(ray.get(answer)))
        return bool(ready)


def _group_number(worker: str, teachers: Sequence[str]) -> int:
    return 1 + (_GROUPS.index(worker) if worker in _GROUPS else len(_GROUPS) + teachers.index(worker))
