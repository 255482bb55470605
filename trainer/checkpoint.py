"""Checkpoints: written aside, listed, flushed, then renamed, so that a folder named `step_N` is always whole.

`step_N` holds the state after N completed steps: what the trainer wrote, and `run_state.json`. Prompts, mixing and
seeds are functions of the step, so the step is all that the data side has to remember.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_STATE = "run_state.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    """Where it is."""
    step: int
    """Completed optimizer steps."""
    state: dict[str, Any]
    """What `write` was given."""


def write(
    root: Path,
    step: int,
    state: dict[str, Any],
    save: Callable[[Path], None],
    *,
    keep_last: int,
    keep_step: int | None = None,
) -> Checkpoint:
    """Write `step_N` atomically, then remove the oldest beyond `keep_last`.

    Args:
        root: the folder of checkpoints.
        step: completed optimizer steps.
        state: small JSON state of the run.
        save: writes the trainer's state into the folder it is given.
        keep_last: newest checkpoints that stay.
        keep_step: a step whose checkpoint stays however old it is.
    """
    root.mkdir(parents=True, exist_ok=True)
    temporary, final = root / f"step_{step}.tmp", root / f"step_{step}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    save(temporary)
    files = {str(p.relative_to(temporary)): p.stat().st_size for p in sorted(temporary.rglob("*")) if p.is_file()}
    state_file = temporary / _STATE
    state_file.write_text(json.dumps({"step": step, "files": files, "state": state}, indent=1), encoding="utf-8")
    folders = [path for path in temporary.rglob("*") if path.is_dir()]
    for path in [*(temporary / name for name in files), state_file, *folders, temporary]:
        _flush(path)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    _flush(root)
    for old in sorted(_steps(root))[:-keep_last]:
        if old == keep_step:
            continue
        shutil.rmtree(root / f"step_{old}")
    return Checkpoint(final, step, state)


def newest(root: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; damaged ones are passed over."""
    for step in sorted(_steps(root), reverse=True):
        if (checkpoint := read(root / f"step_{step}")) is not None:
            return checkpoint
    return None


def read(folder: Path) -> Checkpoint | None:
    """The checkpoint in a folder, or None if it is not there or not whole."""
    try:
        content = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        whole = all((folder / name).stat().st_size == size for name, size in content["files"].items())
    except (OSError, json.JSONDecodeError):
        return None
    return Checkpoint(folder, content["step"], content["state"]) if whole else None


def drop_after(root: Path, step: int) -> None:
    """Remove checkpoints of later steps: a run that goes on from an earlier one makes them anew."""
    for later in _steps(root):
        if later > step:
            shutil.rmtree(root / f"step_{later}")


def _steps(root: Path) -> list[int]:
    if not root.is_dir():
        return []
    return [int(found[1]) for path in root.iterdir() if (found := re.fullmatch(r"step_(\d+)", path.name))]


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
