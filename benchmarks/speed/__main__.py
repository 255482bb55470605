"""Steps against TRL's and against their floor: `python -m benchmarks.speed [--case NAME]...`, and then the tables.

Each system runs in processes of its own, one after the other, and is looked at from outside. `--record` keeps what came
out in benchmarks/results/speed.json.
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
from benchmarks.speed.report import print_tables, ratios
from benchmarks.speed.systems import run_system

RECORD = Path("benchmarks/results/speed.json")


def measure(case: Case, console: Console) -> dict[str, Any]:
    """All systems on one case."""
    write_inputs(case)
    found: dict[str, Any] = {"case": case.name, "batch": case.batch}
    for name, system, arguments in (
        ("gkd", "ours", ("0",)),
        ("gkd_streaming", "ours", ("1",)),
        ("floor", "floor", ()),
        ("trl", "peer", ()),
    ):
        with console.status(f"{case.name}: {name}"):
            found[name] = run_system(case, system, *arguments)
    return found | {"ratios": ratios(found)}


def main(
    case: Annotated[list[str] | None, typer.Option(help="Measure these cases alone.")] = None,
    record: Annotated[bool, typer.Option("--record", help=f"Write {RECORD}, too.")] = False,
) -> None:
    """Measure steps beside TRL's `GKDTrainer` and beside the sum of their parts."""
    unknown = sorted(set(case or ()) - CASES.keys())
    if unknown:
        raise typer.BadParameter(f"{unknown[0]} is no case: use some of {', '.join(CASES)}")
    console = Console()
    found = [measure(CASES[name], console) for name in case or CASES]
    summary = {"machine": machine(), "cases": found}
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path in (FOLDER / "speed.json", *([RECORD] if record else [])):
        path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print_tables(found, console)


if __name__ == "__main__":
    typer.run(main)
