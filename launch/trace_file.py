"""The file of a timeline: Chrome's trace event format, which ui.perfetto.dev and chrome://tracing open.

It is the format's array form, an event a line:

    [
    {"name": ...}
    ,{"name": ...}
    ]

New events overwrite the closing bracket and bring another one, in a single write, so the file is valid JSON after each.
Should a write be cut all the same (a full disk, a power cut), then Perfetto opens the array without its end, and a run
that goes on drops the line that was cut.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_BEGIN, _END = b"[\n", b"]\n"


class TraceFile:
    """Appends events to a new file, or to what an earlier run wrote."""

    def __init__(self, path: Path) -> None:
        path.touch()
        self._file = path.open("r+b", buffering=0)
        self._size = _size_of_whole_lines(path)
        """Bytes before the closing bracket."""

    def append(self, events: Iterable[dict[str, Any]]) -> None:
        """Write some events."""
        # Perfetto reads no \uXXXX.
        lines = [json.dumps(event, ensure_ascii=False, separators=(",", ":")) for event in events]
        if not lines:
            return
        begin = b"," if self._size > len(_BEGIN) else _BEGIN[self._size :]
        new = begin + "\n,".join(lines).encode() + b"\n"
        self._file.seek(self._size)
        self._file.write(new + _END)
        self._file.truncate()
        self._size += len(new)

    def close(self) -> None:
        """No more events come."""
        self._file.close()


def _size_of_whole_lines(path: Path) -> int:
    """Up to the closing bracket, or the line that was cut."""
    size = 0
    with path.open("rb") as file:
        for line in file:  # one at a time: the file may be long
            if line == _END or not line.endswith(b"\n"):
                break
            size += len(line)
    return size
