"""`make bench-quality`: runs of the comparison, one after the other, then tables and plots of all that are done.

Then the comparison of truncated students (`benchmarks.truncation`) goes on.

Finished runs are lines of benchmarks/results/quality.jsonl and are not done again: the whole takes hours, in parts.
"""

import os
import subprocess
import sys
import time
from typing import Annotated

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # every model is made here; before transformers is imported

import ray
import typer
from rich.console import Console

from benchmarks.quality import task
from benchmarks.quality.kept_workers import KeptWorkers
from benchmarks.quality.methods import METHODS
from benchmarks.quality.plan import next_cell
from benchmarks.quality.report import PAGE, write
from benchmarks.quality.results import append, read_results
from benchmarks.quality.runs import FOLDER, run


def main(
    minutes: Annotated[float, typer.Option(help="Begin no further run after so many minutes.")] = 24 * 60,
    method: Annotated[
        list[str] | None, typer.Option(help="Compare these methods alone, and leave truncation out.")
    ] = None,
) -> None:
    """Do what is not done yet of the comparison."""
    unknown = sorted(set(method or ()) - METHODS.keys())
    if unknown:
        raise typer.BadParameter(f"{unknown[0]} is no method: use some of {', '.join(METHODS)}")
    console, ends = Console(), time.monotonic() + 60 * minutes
    task.prepare(FOLDER)
    # Kept workers sit beside those of a run. Ray books more CPUs than the host has, as the workers take turns.
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, configure_logging=False)
    with KeptWorkers() as kept:
        while time.monotonic() < ends:
            results = read_results()
            cell = next_cell(results, method or list(METHODS))
            if cell is None:
                console.print(f"all {len(results)} runs are done")
                break
            console.rule(f"run {len(results) + 1}: {cell.name}")
            result = run(cell, kept, console)
            append(result)
            console.print(
                f"exact match {result.before['exact_match']:.3f} -> {result.after['exact_match']:.3f}, reverse KL "
                f"{result.before['reverse_kl']:.4f} -> {result.after['reverse_kl']:.4f}"
            )
    results = read_results()
    if results:
        write(results, FOLDER)
        console.print(f"{len(results)} runs: {PAGE} and {FOLDER / 'summary.json'}")
    if not method:
        ray.shutdown()
        left = max(0.0, (ends - time.monotonic()) / 60)
        subprocess.run([sys.executable, "-m", "benchmarks.truncation", f"--minutes={left}"], check=True)


if __name__ == "__main__":
    typer.run(main)
