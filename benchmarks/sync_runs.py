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

from benchmarks.record import markdown, panels
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
_PARTS = {
    "transfer_s": ("weight sync", {"transfer"}),
    "gather_s": ("rank 0", {"gather"}),
    "load_s": ("rollout 0", {"load bucket", "finish update"}),  # of an adapter, the first only keeps what came
    "probe_s": ("weight sync", {"probe"}),
    "proof_s": ("weight sync", {"proof"}),
}
"""Lane of the timeline, and the intervals in it that are added up."""
_HEADINGS = {
    "sync_s": "whole (s)",
    "transfer_s": "transfer",
    "gather_s": "of which ZeRO 3 gathers",
    "load_s": "of which vLLM loads",
    "probe_s": "probe",
    "proof_s": "proof",
}


def config_tree(name: str, folder: Path) -> dict[str, Any]:
    """The config of a way's run, whose outputs go to `folder`."""
    tree: dict[str, Any] = {
        "run": {"name": "sync", "output_dir": str(folder), "resume": "never"},
        "student": {"model": str(_CASE.folder / "student")},
        "teacher": {"model": str(_CASE.folder / "teacher")},
        "data": {"train": {"path": str(_CASE.folder / "prompts.jsonl")}},
        "rollout": {"max_new_tokens": _CASE.new_tokens[1]},
        "objective": {"type": "distill", "divergence": {"type": "generalized_jsd", "beta": 0.5}},
        "trainer": {
            "max_steps": _CASE.warm_up + _CASE.steps,
            "batch_size": _CASE.batch,
            "learning_rate": 1e-4,
            "checkpoint_every": 0,
        },
        "log": {"trace": True},
    }
    for section, values in WAYS[name].items():
        tree[section] = tree[section] | values
    return tree


def measure_way(name: str) -> dict[str, Any]:
    """Medians over the counted steps: bytes, and seconds of the parts of a sync."""
    from gkd.config import parse_config
    from launch.train import run_training

    folder = _CASE.folder / "run"
    shutil.rmtree(folder, ignore_errors=True)
    run_training(parse_config(config_tree(name, folder)), Console(quiet=True))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    events = json.loads((folder / "trace.json").read_text(encoding="utf-8"))
    counted = sync_parts(events)[_CASE.warm_up :]
    seconds = {part: statistics.median(sync[part] for sync in counted) for part in _HEADINGS}
    return {"way": name, "bytes": lines[-1]["sync/bytes"], **seconds}


def sync_parts(events: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Of every sync in a timeline, in order: its seconds, and those of its parts."""
    lanes = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    intervals = [event for event in events if event["ph"] == "X"]

    def within(sync: dict[str, Any], lane: str, names: set[str]) -> float:
        """Seconds of the intervals that begin during a sync. Workers call some of theirs as the driver does its own."""
        return sum(
            event["dur"] / 1e6
            for event in intervals
            if lanes[event["tid"]] == lane
            and event["name"] in names
            and sync["ts"] <= event["ts"] <= sync["ts"] + sync["dur"]
        )

    return [
        {"sync_s": sync["dur"] / 1e6, **{part: within(sync, *where) for part, where in _PARTS.items()}}
        for sync in intervals
        if sync["name"] == "sync"
    ]


def table(found: Sequence[dict[str, Any]]) -> list[str]:
    """A row for each way."""
    rows = [[row["way"], f"{row['bytes'] / 1e6:.1f}", *(f"{row[part]:.3f}" for part in _HEADINGS)] for row in found]
    return markdown(["sync of", "MB", *_HEADINGS.values()], rows)


def plot(found: Sequence[dict[str, Any]], path: Path) -> None:
    """The parts of every way's sync, which follow one another, and the whole."""
    with panels(path, 1, width=8) as (panel,):
        ends = [0.0] * len(found)
        for part in ("transfer_s", "probe_s", "proof_s"):
            seconds = [row[part] for row in found]
            panel.barh(range(len(found)), seconds, 0.4, left=ends, label=_HEADINGS[part])
            ends = [end + more for end, more in zip(ends, seconds, strict=True)]
        panel.plot([row["sync_s"] for row in found], range(len(found)), "kD", label="the whole")
        panel.set_yticks(range(len(found)), [row["way"] for row in found])
        panel.set_xlabel("seconds")
        panel.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))


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
