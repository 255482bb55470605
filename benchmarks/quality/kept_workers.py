"""Rollout engines and teachers that stay up from run to run: on a CPU their start takes as long as a short run."""

from typing import Any

from launch.placement import Place
from launch.ray_session import Workers

_KEPT = ("rollout", "teacher", "teacher_rollout")
_SHARE = 0.01
"""CPUs that Ray books for a kept worker: it has a place of its own beside those of the runs."""


class KeptWorkers:
    """The engines and the teacher of the runs so far, each replaced when a run needs another."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[Any, Workers, Any]] = {}  # worker -> settings, its own place, actor

    def __enter__(self) -> "KeptWorkers":
        return self

    def __exit__(self, *_: object) -> None:
        for _settings, place, _actor in self._held.values():
            place.__exit__()

    def open(self, places: list[Place]) -> Workers:
        """The workers of one run (`launch.train.run_training`)."""
        return _RunWorkers(places, self)

    def actor(self, worker: str, actor_class: Any, settings: Any) -> tuple[Workers, Any]:
        """The worker with these settings: the one that is up, or a new one in its place."""
        if worker in self._held:
            before, place, actor = self._held[worker]
            if before == settings:
                return place, actor
            place.__exit__()
        place = Workers([Place(worker, _SHARE, 0)])
        actor = place.start(worker, actor_class, settings)
        self._held[worker] = (settings, place, actor)
        return place, actor


class _RunWorkers(Workers):
    """The workers of one run: those that train are its own."""

    def __init__(self, places: list[Place], kept: KeptWorkers) -> None:
        super().__init__(places)
        self._kept = kept
        self._borrowed: list[Workers] = []

    def start(self, worker: str, actor_class: Any, settings: Any) -> Any:
        """Start or borrow an actor."""
        if worker not in _KEPT:
            return super().start(worker, actor_class, settings)
        place, actor = self._kept.actor(worker, actor_class, settings)
        self._borrowed.append(place)
        return actor

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until every actor is up, the borrowed ones included."""
        super().wait_ready(timeout_s)
        for place in self._borrowed:
            place.wait_ready(timeout_s)
