"""`make bench`: every measurement of speed and memory, one after the other, and what they come to.

Each part is a module of its own, run in a process of its own: it writes outputs/bench/PART.json. What is known so far
goes into outputs/bench/summary.json after each, so a part that fails costs the others nothing; it is named at the end.
`--record` keeps all: benchmarks/results/bench.json, the tables of docs/PERFORMANCE.md and the plots in docs/bench/. Of
parts without newer numbers, what was recorded before stays. `--device cuda` measures the parts that run on a GPU, each
under a name of its own (`loss_sweep_cuda`).
"""

import json
import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import typer
from rich.console import Console

from benchmarks.headlines import headlines
from benchmarks.record import machine
from benchmarks.speed.cases import FOLDER

Device = Literal["cpu", "cuda"]
_ON_CUDA = "_cuda"
PARTS: dict[Device, tuple[str, ...]] = {
    "cpu": (
        "speed", "overlap", "loss_sweep", "train_step", "sync", "sync_runs", "transport", "growth", "plan",
    ),
    "cuda": (f"loss_sweep{_ON_CUDA}", f"train_step{_ON_CUDA}"),
}  # fmt: skip
"""Modules of this package, with the device behind the name where it is none that all have: each has `table` and `plot`.
"""
SUMMARY, RECORD = FOLDER / "summary.json", Path("benchmarks/results/bench.json")
PAGE, PLOTS = Path("docs/PERFORMANCE.md"), Path("docs/bench")


def run_part(part: str) -> dict[str, Any] | None:
    """What a part measured, and the minutes that it took; None if it failed, and then it has said why."""
    output, begun = FOLDER / f"{part}.json", time.monotonic()
    output.unlink(missing_ok=True)  # another part may read it, and must not take an older one for it
    device = ["--device=cuda"] if part.endswith(_ON_CUDA) else []
    command = [sys.executable, "-m", _module(part), "--output", str(output), *device]
    done = subprocess.run(command, check=False)
    if done.returncode:
        output.unlink(missing_ok=True)  # nor one that is not whole
        return None
    found = json.loads(output.read_text(encoding="utf-8"))
    return {"found": found, "minutes": round((time.monotonic() - begun) / 60, 2)}


def _module(part: str) -> str:
    return f"benchmarks.{part.removesuffix(_ON_CUDA)}"


def summarised(parts: dict[str, Any]) -> dict[str, Any]:
    """What the parts come to, and the parts themselves."""
    return headlines({name: measured["found"] for name, measured in parts.items()}) | {
        "minutes": sum(measured.get("minutes", 0.0) for measured in parts.values()),
        "machine": machine(),
        "parts": parts,
    }


def record(parts: dict[str, Any]) -> None:
    """Numbers, tables and plots into the files that are kept, beside those of parts that are not among these."""
    _write(RECORD, summarised(_parts_in(RECORD) | parts))
    PLOTS.mkdir(exist_ok=True)
    page = PAGE.read_text(encoding="utf-8")
    for part, measured in parts.items():
        import_module(_module(part)).plot(measured["found"], PLOTS / f"{part}.png")
        page = _replaced(page, part, lines_of(part, measured["found"]))
    PAGE.write_text(page, encoding="utf-8")


def lines_of(part: str, found: Any) -> list[str]:
    """What the page says of a part: its plot and its table."""
    plot = (PLOTS / f"{part}.png").relative_to(PAGE.parent).as_posix()
    return [f"![{part}]({plot})", "", *import_module(_module(part)).table(found)]


def _replaced(page: str, part: str, lines: list[str]) -> str:
    """The page with a part's plot and table in the place that is marked for it."""
    begin, end = f"<!-- {part}: begin -->", f"<!-- {part}: end -->"
    before, rest = page.split(begin)
    return "\n".join([before + begin, *lines, end]) + rest.split(end)[1]


def _parts_in(path: Path) -> dict[str, Any]:
    """The parts of a summary that may not be there."""
    return json.loads(path.read_text(encoding="utf-8"))["parts"] if path.exists() else {}


def _write(path: Path, summary: dict[str, Any]) -> None:
    path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def main(
    part: Annotated[list[str] | None, typer.Option(help="Measure these alone; the others' last numbers stay.")] = None,
    device: Annotated[Device, typer.Option(help="Where: on a GPU the loss and a training step are measured.")] = "cpu",
    keep: Annotated[bool, typer.Option("--record", help=f"Write {RECORD}, {PAGE} and {PLOTS}, too.")] = False,
) -> None:
    """Measure speed and memory."""
    there = PARTS[device]
    unknown = sorted(set(part or ()) - set(there))
    if unknown:
        raise typer.BadParameter(f"{unknown[0]} is no part on {device}: use some of {', '.join(there)}")
    console = Console()
    FOLDER.mkdir(parents=True, exist_ok=True)
    parts = _parts_in(SUMMARY) if part or device == "cuda" else {}
    new: dict[str, Any] = {}
    failed = []
    for name in (name for name in there if not part or name in part):
        console.rule(name)
        measured = run_part(name)
        if measured is None:
            failed.append(name)
        else:
            new[name] = measured
        _write(SUMMARY, summarised(parts | new))
    if keep:
        record(new)
    for name, value in summarised(parts | new).items():
        if isinstance(value, float):
            console.print(f"{name} {value:.3g}")
    if failed:
        console.print(f"failed: {', '.join(failed)}")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
