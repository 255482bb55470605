"""What a process and all that it started hold, looked at from outside."""

import re
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

EVERY_S = 0.5
_MORE_BYTES = 20_000_000
"""Growth of what is resident after which PSS is asked again: how exact its peak is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Peaks, in bytes."""

    largest: int
    """Resident in one process: the most that any had."""
    largest_name: str
    """Which process that was."""
    own: dict[str, int]
    """Name of a process, without what it is doing -> the most resident in any of that name, shared memory left out:
    pages of Ray's object store are resident in everyone who has touched them, and are nobody's own."""
    idle: int
    """PSS of all processes together (pages that several share count once) when the models were loaded."""
    peak: int
    """PSS of all processes together, the most that was seen."""


class MemoryWatch:
    """Looks at a process and its descendants from time to time, in a thread, until `close`.

    Resident memory is a number that the kernel has ready. For PSS it goes through all pages of a process, which has to
    wait meanwhile; so that is asked only when there is more resident than before.
    """

    def __init__(self, pid: int) -> None:
        """`pid` is the first process's."""
        self._root = psutil.Process(pid)
        self._largest: tuple[int, str] = (0, "")
        self._own: dict[str, int] = {}
        self._idle, self._peak = 0, 0
        self._most_resident = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._go_on, daemon=True)
        self._thread.start()

    def mark_idle(self) -> None:
        """Everything is loaded, and nothing has been done with it."""
        self._idle = self._shared_out()

    def close(self) -> Memory:
        """Stop looking."""
        self._done.set()
        self._thread.join()
        largest, largest_name = self._largest
        return Memory(
            largest=largest,
            largest_name=largest_name,
            own=self._own,
            idle=self._idle,
            peak=max(self._peak, self._idle),
        )

    def _go_on(self) -> None:
        while not self._done.wait(EVERY_S):
            resident = self._resident()
            if resident > self._most_resident + _MORE_BYTES:
                self._most_resident = resident
                self._peak = max(self._peak, self._shared_out())

    def _resident(self) -> int:
        """Of all processes, pages that several share counted for each; remembers the most that each had."""
        total = 0
        for process in self._processes():
            with suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
                resident, shared = resident_bytes(process.pid)
                total += resident
                name = _name(process)
                self._largest = max(self._largest, (resident, name))
                self._own[name] = max(resident - shared, self._own.get(name, 0))
        return total

    def _shared_out(self) -> int:
        """PSS of all processes."""
        total = 0
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                total += process.memory_full_info().pss
        return total

    def _processes(self) -> list[Any]:
        try:
            return [self._root, *self._root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def resident_bytes(pid: int) -> tuple[int, int]:
    """Of a process, and how much of that is shared memory (libraries and other files are not in it).

    Raises:
        FileNotFoundError, ProcessLookupError: if it has ended.
    """
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    kilobytes = dict(re.findall(r"^(VmRSS|RssShmem):\s+(\d+) kB$", status, flags=re.MULTILINE))
    return int(kilobytes.get("VmRSS", 0)) * 1024, int(kilobytes.get("RssShmem", 0)) * 1024  # none are a zombie's


def _name(process: Any) -> str:
    """Ray calls a worker after its actor's class and, behind a dot, the method that it is in."""
    command = process.cmdline()
    name = command[0] if command else process.name()
    return name.split(".")[0] if name.startswith("ray::") else name
