"""The task of the comparison: the chain sum of ten operands, its files and its untrained models."""

import json
from pathlib import Path

import numpy as np

from gkd.seeds import generator
from launch.chain_sum import make_problem, write_models

OPERANDS = (10, 10)
"""All problems are of one length: they differ in nothing but what is to be worked out."""
TEACHER_PROBLEMS, HELD_OUT_PROBLEMS = 60_000, 1_000
TEST_PROBLEMS = 2_000
LABELS = {"clean": 600, "noisy": 1_000}
"""Setting -> examples that a student has: the data of its warm start and of every method after it."""
SLIP = 0.06
"""Of the setting noisy: the share of running totals that are off by one; what follows goes on from there."""


def prepare(folder: Path) -> None:
    """Everything that no student has of its own: the teachers' data, held-out problems, untrained models."""
    random, seen = generator(0, "quality", "common"), set[str]()
    for name, count in {
        "teacher": TEACHER_PROBLEMS,
        "validation": HELD_OUT_PROBLEMS,
        "test": TEST_PROBLEMS,
    }.items():
        _write(folder / "data" / f"{name}.jsonl", _problems(random, count, seen))
    write_models(folder / "models")


def labels(folder: Path, setting: str, seed: int) -> Path:
    """The examples of one student: problems that neither the teachers' data nor the held-out files have."""
    path = folder / "data" / f"{setting}-{seed}.jsonl"
    if not path.exists():
        seen = {
            json.loads(line)["prompt"]
            for name in ("teacher", "validation", "test")
            for line in (folder / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        }
        random = generator(seed, "quality", setting)
        problems = _problems(random, LABELS[setting], seen)
        slips = SLIP if setting == "noisy" else 0.0
        _write(path, [(prompt, _with_slips(prompt, random, slips) if slips else right) for prompt, right in problems])
    return path


def read(folder: Path, name: str) -> list[tuple[str, str]]:
    """(prompt, completion) of a file."""
    lines = (folder / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [(record["prompt"], record["completion"]) for record in map(json.loads, lines)]


def _problems(random: np.random.Generator, count: int, seen: set[str]) -> list[tuple[str, str]]:
    """New problems, which `seen` knows afterwards."""
    found: list[tuple[str, str]] = []
    while len(found) < count:
        prompt, completion = make_problem(random, OPERANDS)
        if prompt not in seen:
            seen.add(prompt)
            found.append((prompt, completion))
    return found


def _with_slips(prompt: str, random: np.random.Generator, share: float) -> str:
    """The running totals of somebody who is off by one now and then, and goes on from the wrong total."""
    total, totals = int(prompt[0]), []
    for sign, digit in zip(prompt[1:-1:2], prompt[2:-1:2], strict=True):
        total += int(digit) if sign == "+" else -int(digit)
        if random.random() < share:
            total += 1 if random.random() < 0.5 else -1
        total = min(99, max(0, total))
        totals.append(f"{total:02d}")
    return ";".join(totals)


def _write(path: Path, problems: list[tuple[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in problems]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
