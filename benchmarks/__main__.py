"""`make bench`: every measurement of speed and memory, one after the other, and what they come to.

Each part is a module of its own, run in a process of its own: it writes outputs/bench/PART.json. `--record` keeps all:
benchmarks/results/bench.json, the tables of docs/PERFORMANCE.md and the plots in docs/bench/.
"""

import json
import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import typer
from rich.console import Console

from benchmarks.headlines import headlines
from benchmarks.record import machine
from benchmarks.speed.cases import FOLDER

PARTS = ("speed", "overlap", "loss_sweep", "sync", "sync_runs", "transport", "growth")
"""Modules of this package: each has `table`, and some have `plot`."""
SUMMARY, RECORD = FOLDER / "summary.json", Path("benchmarks/results/bench.json")
PAGE, PLOTS = Path("docs/PERFORMANCE.md"), Path("docs/bench")


def run_part(part: str) -> dict[str, Any]:
    """What a part measured, and the minutes that it took.

    Raises:
        subprocess.CalledProcessError: if it failed; it has said why.
    """
    output, begun = FOLDER / f"{part}.json", time.monotonic()
    subprocess.run([sys.executable, "-m", f"benchmarks.{part}", "--output", str(output)], check=True)
    found = json.loads(output.read_text(encoding="utf-8"))
    return {"found": found, "minutes": round((time.monotonic() - begun) / 60, 2)}


def record(summary: dict[str, Any]) -> None:
    """Numbers, tables and plots into the files that are kept."""
    RECORD.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    PLOTS.mkdir(exist_ok=True)
    page = PAGE.read_text(encoding="utf-8")
    for part, measured in summary["parts"].items():
        module = import_module(f"benchmarks.{part}")
        page = _replaced(page, part, module.table(measured["found"]))
        if hasattr(module, "plot"):
            module.plot(measured["found"], PLOTS / f"{part}.png")
    PAGE.write_text(page, encoding="utf-8")


def _replaced(page: str, part: str, lines: list[str]) -> str:
    """The page with a part's table in the place that is marked for it."""
    begin, end = f"<!-- {part}: begin -->", f"<!-- {part}: end -->"
    before, rest = page.split(begin)
    return "\n".join([before + begin, *lines, end]) + rest.split(end)[1]


def main(
    part: Annotated[list[str] | None, typer.Option(help="Measure these alone; the others' last numbers stay.")] = None,
    keep: Annotated[bool, typer.Option("--record", help=f"Write {RECORD}, {PAGE} and {PLOTS}, too.")] = False,
) -> None:
    """Measure speed and memory."""
    unknown = sorted(set(part or ()) - set(PARTS))
    if unknown:
        raise typer.BadParameter(f"{unknown[0]} is no part: use some of {', '.join(PARTS)}")
    console = Console()
    FOLDER.mkdir(parents=True, exist_ok=True)
    before = json.loads(SUMMARY.read_text(encoding="utf-8"))["parts"] if part and SUMMARY.exists() else {}
    parts: dict[str, Any] = {}
    for name in PARTS:
        if part and name not in part:
            parts |= {name: before[name]} if name in before else {}
            continue
        console.rule(name)
        parts[name] = run_part(name)
    summary = headlines({name: measured["found"] for name, measured in parts.items()})
    summary |= {
        "minutes": sum(measured["minutes"] for measured in parts.values()),
        "machine": machine(),
        "parts": parts,
    }
    SUMMARY.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    if keep:
        record(summary)
    for name, value in summary.items():
        if isinstance(value, float):
            console.print(f"{name} {value:.3g}")


if __name__ == "__main__":
    typer.run(main)
