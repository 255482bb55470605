"""Teacher-free truncation, compared (Jha et al., arXiv 2305.14864): `make bench-truncation`.

The teacher of the quality comparison (6 layers x 128, the chain sum) is cut to 3 layers by each strategy, and trained
on by maximum likelihood on data that it was itself trained on, by `gkd train`. Beside it: the same shape with random
weights; vanilla distillation of the same truncated student (maximum likelihood and forward KL, equal weights, on the
same data); maximum likelihood for as many steps as that distillation's FLOPs pay for, with three strategies; the same
shape from random weights with the teacher's whole training; of the truncated student that was trained on, as many steps
again, without the teacher or on-policy against it; and 2 and 4 layers by three strategies. Each finished run is a line
of `benchmarks/results/truncation.jsonl`; the command goes on where it stopped.
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoTokenizer

from benchmarks.choices import shares_right
from benchmarks.quality import task
from benchmarks.quality.measure import cross_entropy, exact_match, load
from benchmarks.quality.report import summary, write_summary
from benchmarks.quality.results import read_results
from benchmarks.quality.runs import FOLDER, TEACHER_BATCH, TEACHER_STEPS, trained_teacher
from benchmarks.truncation_tables import RESULTS, Run, finished, write_tables
from gkd.compress.flops import vanilla_kd_ratio
from gkd.config import parse_config
from launch.init_student import InitStudentRequest, run_init_student
from launch.ray_session import ray_session
from launch.train import run_training

DATA = task.task_folder(FOLDER, task.CHAIN_SUM)
PAGE = Path(__file__).resolve().parent.parent / "docs" / "RESULTS.md"
LAYERS = 3
STEPS = 120
BATCH = 32
RATE, CHAIN_RATE = 2.5e-3, 1e-3
SEEDS = (0, 1, 2)
STRATEGIES = ("first_k", "both_ends", "uniform", "spaced_from_first", "last_k")
LONGER = {"equal_flops": "first_k", "both_ends_longer": "both_ends", "spaced_longer": "spaced_from_first"}
"""Methods with the steps that vanilla distillation's FLOPs pay for -> what they keep."""
OTHER_DEPTHS = {
    f"{strategy}_{layers}": (strategy, layers)
    for layers in (2, 4)
    for strategy in ("first_k", "both_ends", "spaced_from_first")
}
"""Methods -> what they keep, and how many layers, where it is not `LAYERS`."""
KEPT = {name: (name, LAYERS) for name in STRATEGIES} | {name: (LONGER[name], LAYERS) for name in LONGER} | OTHER_DEPTHS
"""Method -> strategy and number of layers; all others keep what `first_k` does."""
CHAIN = ("then_sft", "then_gkd")
"""Methods that go on from the student of `first_k`."""
METHODS = (*STRATEGIES, "random", "kd", *LONGER, *CHAIN, "scratch", *OTHER_DEPTHS)
RECORDS = 12_000
"""Of the teacher's data, in its order: what students train on; the one with the whole budget has all of it."""
TESTED = 500
"""Test problems that are answered, and made into questions."""
EVERY = 10
"""Steps between the points of a curve."""


def main() -> None:
    """Do what is not done yet, then write the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no run after so many")
    parser.add_argument("--report", action="store_true", help="write the page alone")
    options = parser.parse_args()
    console, until = Console(), time.monotonic() + 60 * options.minutes
    if not options.report:
        with ray_session():
            for method, seed in _open(finished()):
                if time.monotonic() > until:
                    break
                result = run(method, seed, console)
                with RESULTS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(result)) + "\n")
                console.print(f"{method}, seed {seed}: {result.start_ce:.3f} -> {result.end_ce:.4f} nats")
    write_tables(finished(), PAGE)
    write_summary(summary(read_results()), FOLDER)


def _open(done: Sequence[Run]) -> Iterator[tuple[str, int]]:
    """Runs that are still to be done: all methods with one seed, then with the next."""
    known = {(result.method, result.seed) for result in done}
    return ((method, seed) for seed in SEEDS for method in METHODS if (method, seed) not in known)


def run(method: str, seed: int, console: Console) -> Run:
    """Train one student and measure it."""
    if not (FOLDER / "models" / "teacher").is_dir():
        task.prepare(FOLDER)
    teacher = trained_teacher(task.CHAIN_SUM, 0, console)
    start = _first_student(method, teacher, seed, console)
    ratio = vanilla_kd_ratio(load(start), load(teacher))
    config = _config(method, start, teacher, seed, ratio)
    export = run_training(parse_config(config), console)
    lines = [json.loads(line) for line in (export.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    held_out, test = task.read(DATA, "validation"), task.read(DATA, "test")[:TESTED]
    student, whole = load(export), load(teacher)
    result = Run(
        method=method,
        seed=seed,
        steps=config["trainer"]["max_steps"],
        batch=config["trainer"]["batch_size"],
        teacher_ce=cross_entropy(whole, tokenizer, held_out),
        start_ce=cross_entropy(load(start), tokenizer, held_out),
        end_ce=cross_entropy(student, tokenizer, held_out),
        exact_match=exact_match(student, tokenizer, task.CHAIN_SUM, test),
        choices=shares_right(student, tokenizer, test),
        teacher_choices=shares_right(whole, tokenizer, test),
        curve={line["step"]: line["eval/cross_entropy"] for line in lines if "eval/cross_entropy" in line},
        tokens=sum(line["tokens/trained"] for line in lines),
        train_s=sum(line["time/step_s"] for line in lines),
        flop_ratio=ratio,
    )
    _put_away(export, method, seed)
    return result


def _put_away(export: Path, method: str, seed: int) -> None:
    """What is kept of a run is its line, and of `first_k` the student that others go on from."""
    if method == STRATEGIES[0] and not _continued(seed).exists():
        shutil.move(export, _continued(seed))
    shutil.rmtree(export.parent)


def _continued(seed: int) -> Path:
    return FOLDER / "truncation" / f"continued-{seed}"


def _first_student(method: str, teacher: Path, seed: int, console: Console) -> Path:
    """What a method begins with; made once."""
    if method in CHAIN:
        if not _continued(seed).exists():
            first = _first_student(STRATEGIES[0], teacher, seed, console)
            config = _config(STRATEGIES[0], first, teacher, seed, ratio=1.0)
            _put_away(run_training(parse_config(config), console), STRATEGIES[0], seed)
        return _continued(seed)
    is_random = method in ("random", "scratch")
    strategy, layers = KEPT.get(method, KEPT[STRATEGIES[0]])
    folder = FOLDER / "truncation" / (f"random-{seed}" if is_random else f"{strategy}-{layers}")
    if not folder.is_dir():
        request = InitStudentRequest(
            teacher=str(teacher),
            output=folder,
            num_layers=layers,
            strategy=strategy,
            layers=None,
            random=is_random,
            seed=seed,
        )
        run_init_student(request, console)
    return folder


def _config(method: str, start: Path, teacher: Path, seed: int, ratio: float) -> dict[str, Any]:
    """Of a run of `gkd train`."""
    whole_budget = method == "scratch"
    steps = TEACHER_STEPS if whole_budget else round(STEPS * ratio) if method in LONGER else STEPS
    name = f"{method}-{seed}"
    config: dict[str, Any] = {
        "run": {"name": name, "seed": seed, "output_dir": str(FOLDER / "truncation" / "runs" / name)},
        "student": {"model": str(start)},
        "data": {
            "train": {"path": str(DATA / "teacher.jsonl" if whole_budget else _few_records())},
            "eval": {"path": str(DATA / "validation.jsonl")},
            "on_policy_fraction": 0.0,
        },
        "objective": {"type": "sft"},
        "eval": {"every_steps": 5 * EVERY if whole_budget else EVERY, "metrics": ["cross_entropy"]},
        "trainer": {
            "max_steps": steps,
            "batch_size": TEACHER_BATCH if whole_budget else BATCH,
            "learning_rate": CHAIN_RATE if method in CHAIN else RATE,
            "lr_schedule": "cosine",
            "warmup_steps": 50 if whole_budget else 10,
            "checkpoint_every": 0,
        },
    }
    if method == "kd":
        forward_kl = {"type": "distill", "divergence": {"type": "forward_kl"}}
        terms = [{"weight": 0.5, "objective": {"type": "sft"}}, {"weight": 0.5, "objective": forward_kl}]
        config |= {"teacher": {"model": str(teacher)}, "objective": {"type": "sum", "terms": terms}}
    if method == "then_gkd":
        jsd = {"type": "distill", "divergence": {"type": "generalized_jsd", "beta": 0.5}}
        config |= {"teacher": {"model": str(teacher)}, "objective": jsd}
        config |= {"rollout": {"max_new_tokens": 32, "kv_cache_gib": 0.25}}
        config["data"]["on_policy_fraction"] = 1.0
    return config


def _few_records() -> Path:
    path = DATA / "continue.jsonl"
    if not path.exists():
        lines = (DATA / "teacher.jsonl").read_text(encoding="utf-8").splitlines()
        path.write_text("\n".join(lines[:RECORDS]) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
