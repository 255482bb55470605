"""One run of the comparison: teacher and warm start, which are made once, then the method, then the measurement."""

import hashlib
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoTokenizer

from benchmarks.quality.kept_workers import KeptWorkers
from benchmarks.quality.measure import exact_match, load, measure
from benchmarks.quality.methods import METHODS
from benchmarks.quality.plan import FEW_SEEDS, STEPS
from benchmarks.quality.results import SERIES_EVERY, Cell, Result
from benchmarks.quality.task import SETTINGS, Task, labels, read, task_folder
from gkd.config import parse_config
from launch.export import run_export
from launch.run_folder import exported_step
from launch.train import run_training

FOLDER = Path("outputs/quality")
BATCH = 32
TEACHER_STEPS, TEACHER_BATCH = 1050, 48
_WARM_RATE = 2.5e-3
"""Learning rate of warm starts, constant: methods go on from weights that bear such steps. From a warm start that was
annealed to 0 the first steps at a rate that is worth having undo what was learnt, and some runs never recover.
"""
_CHECKPOINT_EVERY = 20
"""Steps, in the runs that are measured along the way."""


def run(cell: Cell, kept: KeptWorkers, console: Console) -> Result:
    """Do one cell of the plan."""
    task = SETTINGS[cell.setting].task
    teacher = trained_teacher(task, cell.teacher, console)
    warm = _warm_start(cell, console)
    problems = read(task_folder(FOLDER, task), cell.split)
    scorer = load(teacher)
    before = _measured_once(warm, scorer, task, problems, cell)
    export = run_training(parse_config(_method_config(cell, warm, teacher)), console, open_workers=kept.open)
    after = measure(export, scorer, task, problems, seed=cell.seed)
    lines = _lines(export.parent)
    curve, series = [], {}
    if _followed(cell):
        curve = [(0.0, before["exact_match"]), *_curve(export.parent, lines, task, problems)]
        series = _series(lines)
    shutil.rmtree(export.parent)  # what is kept of a run is its line
    return Result(
        cell=cell,
        warm=weights_hash(warm),
        teacher=weights_hash(teacher),
        before=before,
        after=after,
        metrics=_metrics(lines),
        curve=curve,
        series=series,
    )


def trained_teacher(task: Task, seed: int, console: Console) -> Path:
    """The teacher's folder; it is trained where it is not there yet."""
    return _trained_once(
        f"teacher-{task.name}-{seed}",
        console,
        {
            "run": {"seed": seed},
            "student": {"model": str(FOLDER / "models" / "teacher"), "init": "random"},
            "data": {"train": {"path": str(task_folder(FOLDER, task) / "teacher.jsonl")}},
            "objective": {"type": "sft"},
            "trainer": _trainer(TEACHER_STEPS, 2.5e-3, batch_size=TEACHER_BATCH, warmup_steps=50),
        },
    )


def _warm_start(cell: Cell, console: Console) -> Path:
    setting = SETTINGS[cell.setting]
    return _trained_once(
        f"warm-{cell.setting}-{cell.seed}",
        console,
        {
            "run": {"seed": cell.seed},
            "student": {"model": str(FOLDER / "models" / setting.student), "init": "random"},
            "data": {"train": {"path": str(labels(FOLDER, cell.setting, cell.seed))}},
            "objective": {"type": "sft"},
            "trainer": _trainer(setting.warm_steps, _WARM_RATE, batch_size=BATCH, warmup_steps=50)
            | {"lr_schedule": "constant"},
        },
    )


def _method_config(cell: Cell, warm: Path, teacher: Path) -> dict[str, Any]:
    method, new_tokens = METHODS[cell.method], SETTINGS[cell.setting].task.new_tokens
    examples = labels(FOLDER, cell.setting, cell.seed)
    return {
        "run": {"name": cell.name, "seed": cell.seed, "output_dir": str(FOLDER / "runs" / cell.name)},
        "student": {"model": str(warm)},
        "teacher": {"model": str(teacher)},
        "data": {"train": {"path": str(examples)}} | method.get("data", {"on_policy_fraction": 0.0}),
        "rollout": {"temperature": 1.0, "max_new_tokens": new_tokens, "kv_cache_gib": 0.25, "record_logprobs": True},
        "objective": method["objective"],
        "trainer": _trainer(cell.steps, cell.learning_rate, batch_size=BATCH, warmup_steps=10)
        | ({"checkpoint_every": _CHECKPOINT_EVERY, "keep_last": 100} if _followed(cell) else {}),
    } | ({"reward": method["reward"]} if "reward" in method else {})


def _trainer(steps: int, rate: float, *, batch_size: int, warmup_steps: int) -> dict[str, Any]:
    return {
        "max_steps": steps,
        "batch_size": batch_size,
        "learning_rate": rate,
        "lr_schedule": "cosine",
        "warmup_steps": warmup_steps,
        "checkpoint_every": 0,
    }


def _trained_once(name: str, console: Console, config: dict[str, Any]) -> Path:
    """The model of a run that many cells begin with or learn from."""
    folder = FOLDER / name
    if exported_step(folder) == config["trainer"]["max_steps"]:
        return folder / "export"  # at once: checking the run's data again takes longer than a short run
    config["run"] |= {"name": name, "output_dir": str(folder)}
    return run_training(parse_config(config), console)


def _measured_once(warm: Path, teacher: Any, task: Task, problems: list[tuple[str, str]], cell: Cell) -> dict[str, Any]:
    """The warm start under this teacher; kept beside it."""
    path = warm.parent / f"measured-t{cell.teacher}-{cell.split}.json"
    if not path.exists():
        path.write_text(json.dumps(measure(warm, teacher, task, problems, seed=cell.seed)), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def weights_hash(folder: Path) -> str:
    """Of a model's weights, by name and content."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(folder / "model.safetensors").items()):
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


def _followed(cell: Cell) -> bool:
    """Whether a run is measured along the way too."""
    return (cell.setting, cell.teacher, cell.split, cell.steps) == (
        "clean",
        0,
        "test",
        STEPS,
    ) and cell.seed in FEW_SEEDS


def _curve(
    run: Path, lines: list[dict[str, Any]], task: Task, problems: list[tuple[str, str]]
) -> list[tuple[float, float]]:
    """(tokens trained on, exact match) of every checkpoint."""
    found = []
    for step in range(_CHECKPOINT_EVERY, len(lines) + 1, _CHECKPOINT_EVERY):
        model = run / f"model-{step}"
        run_export(run, model, which=str(step), form="full", console=Console(quiet=True))
        tokens = sum(line["tokens/trained"] for line in lines[:step])
        found.append((float(tokens), exact_match(load(model), AutoTokenizer.from_pretrained(model), task, problems)))
    return found


def _series(lines: list[dict[str, Any]]) -> dict[str, list[float]]:
    """The run's own moment-matching distances, from step 1 on."""
    logged = {name: [line.get(f"loss/{name}") for line in lines[::SERIES_EVERY]] for name in ("d_off", "d_on")}
    return {name: values for name, values in logged.items() if None not in values}


def _lines(run: Path) -> list[dict[str, Any]]:
    """The metrics of each step."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _metrics(lines: list[dict[str, Any]]) -> dict[str, float]:
    seconds = [line["time/step_s"] for line in lines]
    return {
        "tokens": float(sum(line["tokens/trained"] for line in lines)),
        "step_s": statistics.median(seconds),
        "train_s": sum(seconds),
    }
