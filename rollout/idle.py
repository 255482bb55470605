"""How long a worker has had nothing to do."""

import time


class IdleClock:
    """Runs while its worker rests; a worker rests at first."""

    def __init__(self) -> None:
        self._total = 0.0
        self._resting_since: float | None = time.perf_counter()

    def work(self) -> None:
        """The worker has something to do from now on."""
        self._total = self.read()
        self._resting_since = None

    def rest(self) -> None:
        """The worker has nothing to do from now on."""
        if self._resting_since is None:
            self._resting_since = time.perf_counter()

    def read(self) -> float:
        """Seconds without work so far."""
        return self._total + (0.0 if self._resting_since is None else time.perf_counter() - self._resting_since)
