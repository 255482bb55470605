"""Syncs as they are in runs: all weights, a LoRA adapter, ZeRO 3 on two ranks: `python -m benchmarks.sync_runs`.

Short on-policy runs of the 54 M student with `log.trace: true`; the seconds are those of their timelines.
"""

import json
import os
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import typer
from rich.console import Console

from benchmarks.record import markdown
from benchmarks.speed.cases import FOLDER, LARGE, Case, Pair, write_inputs
from launch.ray_session import ray_session

_CASE = Case(
    name="sync_runs",
    pair=Pair(name="sync", vocabulary=LARGE.vocabulary, student=LARGE.teacher, teacher=LARGE.student),
    batch=4,
    prompt_tokens=(12, 12),
    new_tokens=(8, 8),
    steps=4,
)
"""Little is generated: what is looked at is the sync after it."""
WAYS: dict[str, dict[str, Any]] = {
    "all weights": {},
    "LoRA adapter, rank 16": {"student": {"lora": {"r": 16}}},
    "all weights, ZeRO 3 on 2 ranks": {"trainer": {"zero_stage": 3, "num_ranks": 2}},
}
"""What each changes in the config."""
_SPANS = {"transfer_s": "transfer", "load_s": "load bucket", "probe_s": "probe", "proof_s": "proof"}
"""The intervals of the timeline that are added up."""


def measure_way(name: str) -> dict[str, Any]:
    """Medians over the counted steps: bytes, and seconds of the parts of a sync."""
    from gkd.config import parse_config
    from launch.train import run_training

    folder = _CASE.folder / "run"
    shutil.rmtree(folder, ignore_errors=True)
    tree: dict[str, Any] = {
        "run": {"name": "sync", "output_dir": str(folder), "resume": "never"},
        "student": {"model": str(_CASE.folder / "student")},
        "teacher": {"model": str(_CASE.folder / "teacher")},
        "data": {"train": {"path": str(_CASE.folder / "prompts.jsonl")}},
        "rollout": {"max_new_tokens": _CASE.new_tokens[1]},
        "objective": {"type": "distill", "divergence": {"type": "generalized_jsd", "beta": 0.5}},
        "trainer": {"max_steps": _CASE.warm_up + _CASE.steps, "batch_size": _CASE.batch, "checkpoint_every": 0},
        "log": {"trace": True},
    }
    for section, values in WAYS[name].items():
        tree[section] = tree[section] | values
    run_training(parse_config(tree), Console(quiet=True))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    events = json.loads((folder / "trace.json").read_text(encoding="utf-8"))
    syncs = [event for event in events if event["name"] == "sync"][_CASE.warm_up :]
    found = {span: statistics.median(_within(events, sync, part) for sync in syncs) for span, part in _SPANS.items()}
    return {
        "way": name,
        "bytes": lines[-1]["sync/bytes"],
        "sync_s": statistics.median(sync["dur"] / 1e6 for sync in syncs),
        **found,
    }


def _within(events: Sequence[dict[str, Any]], whole: dict[str, Any], part: str) -> float:
    """Seconds of the intervals of a name that begin inside another: of the driver's and the workers' alike."""
    return sum(
        event["dur"] / 1e6
        for event in events
        if event["name"] == part and whole["ts"] <= event.get("ts", -1) <= whole["ts"] + whole["dur"]
    )


def table(found: Sequence[dict[str, Any]]) -> list[str]:
    """A row for each way."""
    head = ["sync of", "MB", "whole (s)", "transfer", "of which vLLM loads", "probe", "proof"]
    rows = [
        [row["way"], f"{row['bytes'] / 1e6:.1f}", *(f"{row[key]:.3f}" for key in ("sync_s", *_SPANS))] for row in found
    ]
    return markdown(head, rows)


def main(
    output: Annotated[Path, typer.Option(help="File of the numbers.")] = FOLDER / "sync_runs.json",
) -> None:
    """Measure syncs within runs."""
    console, found = Console(), []
    write_inputs(_CASE)
    with ray_session():
        for name in WAYS:
            with console.status(name):
                found.append(measure_way(name))
            console.print(table(found)[-1])
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
