"""What a process and all that it started hold, looked at from outside."""

import subprocess
import threading
from dataclasses import dataclass
from typing import Any

import psutil

EVERY_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Peaks, in bytes."""

    largest: int
    """Resident in one process: the most that any had."""
    largest_name: str
    """Which process that was."""
    idle: int
    """PSS of all processes together (pages that several share count once) when the models were loaded."""
    peak: int
    """PSS of all processes together, the most that was seen."""


class MemoryWatch:
    """Looks at a process and its descendants from time to time, in a thread, until `close`."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._root = psutil.Process(process.pid)
        self._largest, self._largest_name, self._idle, self._peak = 0, "", 0, 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._go_on, daemon=True)
        self._thread.start()

    def mark_idle(self) -> None:
        """Everything is loaded, and nothing has been done with it."""
        self._idle = self._look()

    def close(self) -> Memory:
        """Stop looking."""
        self._done.set()
        self._thread.join()
        return Memory(
            largest=self._largest, largest_name=self._largest_name, idle=self._idle, peak=max(self._peak, self._idle)
        )

    def _go_on(self) -> None:
        while not self._done.wait(EVERY_S):
            self._peak = max(self._peak, self._look())

    def _look(self) -> int:
        total = 0
        for process in self._processes():
            try:
                info = process.memory_full_info()
                name = process.cmdline()[0] if process.cmdline() else process.name()
            except psutil.NoSuchProcess:
                continue
            total += info.pss
            if info.rss > self._largest:
                self._largest, self._largest_name = info.rss, name
        return total

    def _processes(self) -> list[Any]:
        try:
            return [self._root, *self._root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []
