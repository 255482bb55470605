"""Steps against TRL's and against their floor: `python -m benchmarks.speed [--case NAME]...`, and then the tables.

Each system runs in processes of its own, one after the other, and is looked at from outside.
"""

import json
import os
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import typer
from rich.console import Console

from benchmarks.record import machine
from benchmarks.speed.cases import CASES, FOLDER, Case, write_inputs
from benchmarks.speed.report import ratios, table
from benchmarks.speed.systems import run_system


def measure(case: Case, console: Console) -> dict[str, Any]:
    """All systems on one case."""
    write_inputs(case)
    found: dict[str, Any] = {"case": case.name, "batch": case.batch}
    systems: dict[str, tuple[str, ...]] = {"gkd": ("ours", "0"), "floor": ("floor",), "trl": ("peer",)}
    if case.streams:
        systems["gkd_streaming"] = ("ours", "1")
    for name, arguments in systems.items():
        with console.status(f"{case.name}: {name}"):
            found[name] = run_system(case, *arguments)
    return found | {"ratios": ratios(found)}


def main(
    case: Annotated[list[str] | None, typer.Option(help="Measure these cases alone.")] = None,
    output: Annotated[Path, typer.Option(help="File of the numbers.")] = FOLDER / "speed.json",
) -> None:
    """Measure steps beside TRL's `GKDTrainer` and beside the sum of their parts."""
    unknown = sorted(set(case or ()) - CASES.keys())
    if unknown:
        raise typer.BadParameter(f"{unknown[0]} is no case: use some of {', '.join(CASES)}")
    console, found = Console(), []
    for name in case or CASES:
        found.append(measure(CASES[name], console))
        console.print(table({"cases": found})[-1], soft_wrap=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({"machine": machine(), "cases": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
