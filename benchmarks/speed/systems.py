"""A system on a case, in processes of its own, and looked at from outside."""

import json
import subprocess
import sys
import time
from dataclasses import asdict
from typing import Any

from benchmarks.speed.cases import READY, Case
from benchmarks.speed.memory import MemoryWatch


def run_system(case: Case, system: str, *arguments: str) -> dict[str, Any]:
    """Run `benchmarks.speed.SYSTEM` on a case whose inputs are written: what it measured, what it held, and how long it
    took until everything was loaded (`start_s`, Python's own start included), where it says so.

    Raises:
        RuntimeError: if it failed, with the end of what it printed.
    """
    output, log = case.folder / f"{system}.json", case.folder / f"{system}.log"
    command = [sys.executable, "-m", f"benchmarks.speed.{system}", str(case.folder), *arguments, str(output)]
    started: dict[str, float] = {}
    with log.open("w", encoding="utf-8") as errors:
        begun = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        watch = MemoryWatch(process.pid)
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == READY:
                started["start_s"] = time.monotonic() - begun
                watch.mark_idle()
        code = process.wait()
    memory = watch.close()
    if code:
        raise RuntimeError(f"{' '.join(command)} failed; the end of {log}:\n{log.read_text(encoding='utf-8')[-2000:]}")
    return json.loads(output.read_text(encoding="utf-8")) | started | {"memory": asdict(memory)}
