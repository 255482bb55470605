"""What is learnt in the comparison: two tasks, the settings in which students meet them, their files and models."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.quality import sorting
from gkd.seeds import generator
from launch.chain_sum import SHAPES, make_problem, write_models

OPERANDS = (10, 10)
"""All chain sums are of one length: they differ in nothing but what is to be worked out."""
TEACHER_PROBLEMS, HELD_OUT_PROBLEMS = 60_000, 1_000
TEST_PROBLEMS = 2_000
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "head_dim": 32,  # vLLM runs none that are smaller on CPUs
    "intermediate_size": 24,
}
"""Shape of a student that is nearly too small for the task: 5,000 steps of maximum likelihood, annealed, bring it to an
exact match of .886; with a hidden layer of 48 it is .989, with one of 16 .001 (one student each)."""
SLIP = 0.06
"""Of the setting noisy: the share of running totals that are off by one; what follows goes on from there."""

MakeProblem = Callable[[np.random.Generator], tuple[str, str]]


def _chain_sum(random: np.random.Generator) -> tuple[str, str]:
    return make_problem(random, OPERANDS)


def _whole(completion: str) -> str:
    return completion


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Problems and what counts as their answer."""

    name: str
    """Its folder, of data and teachers."""
    make: MakeProblem
    """A student's problem: (prompt, right completion)."""
    make_for_teacher: MakeProblem
    """Likewise for the teacher."""
    new_tokens: int
    """Longest completion."""
    answer: Callable[[str], str]
    """What of a completion has to be right."""


CHAIN_SUM = Task(name="chain_sum", make=_chain_sum, make_for_teacher=_chain_sum, new_tokens=32, answer=_whole)
SORTING = Task(
    name="sorting",
    make=sorting.make_problem,
    make_for_teacher=sorting.make_teacher_problem,
    new_tokens=sorting.NEW_TOKENS,
    answer=sorting.last_state,
)
TASKS = (CHAIN_SUM, SORTING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a student has to learn from."""

    task: Task
    """What it learns."""
    examples: int
    """Its own: the data of its warm start and of every method after it."""
    warm_steps: int
    """Of maximum likelihood on them, before the methods part."""
    slip: float = 0.0
    """Share of the running totals in its examples that are wrong."""
    student: str = "student"
    """Its shape: the name of an untrained model."""


SETTINGS = {
    "clean": Setting(task=CHAIN_SUM, examples=600, warm_steps=600),
    "noisy": Setting(task=CHAIN_SUM, examples=1_000, warm_steps=600, slip=SLIP),
    "sorting": Setting(task=SORTING, examples=100, warm_steps=100),
    "small": Setting(task=CHAIN_SUM, examples=20_000, warm_steps=5_000, student="small"),
}


def prepare(folder: Path) -> None:
    """Everything that no student has of its own: the teachers' data, held-out problems, untrained models."""
    for task in TASKS:
        random, seen = generator(0, "quality", _seed_name(task, "common")), set[str]()
        _write(
            task_folder(folder, task) / "teacher.jsonl",
            _problems(task.make_for_teacher, random, TEACHER_PROBLEMS, seen),
        )
        for name, count in {"validation": HELD_OUT_PROBLEMS, "test": TEST_PROBLEMS}.items():
            _write(task_folder(folder, task) / f"{name}.jsonl", _problems(task.make, random, count, seen))
    write_models(folder / "models", SHAPES | {"small": SMALL})


def task_folder(folder: Path, task: Task) -> Path:
    """Of a task's data."""
    return folder / "data" / task.name


def labels(folder: Path, name: str, seed: int) -> Path:
    """The examples of one student in a setting, on none of whose problems teachers learn or students are measured."""
    setting = SETTINGS[name]
    data = task_folder(folder, setting.task)
    path = data / f"{name}-{seed}.jsonl"
    if not path.exists():
        seen = {_problem(prompt) for held in ("teacher", "validation", "test") for prompt, _ in read(data, held)}
        random = generator(seed, "quality", name)
        problems = _problems(setting.task.make, random, setting.examples, seen)
        if setting.slip:
            problems = [(prompt, _with_slips(prompt, random, setting.slip)) for prompt, _ in problems]
        _write(path, problems)
    return path


def read(data: Path, name: str) -> list[tuple[str, str]]:
    """(prompt, completion) of a file in a task's folder."""
    lines = (data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [(record["prompt"], record["completion"]) for record in map(json.loads, lines)]


def _seed_name(task: Task, name: str) -> str:
    return name if task is CHAIN_SUM else f"{task.name} {name}"


def _problem(prompt: str) -> str:
    """A teacher's prompt may go on with the beginning of a trace; the problem ends with its `=`."""
    return prompt[: prompt.index("=")]


def _problems(make: MakeProblem, random: np.random.Generator, count: int, seen: set[str]) -> list[tuple[str, str]]:
    """New problems, which `seen` knows afterwards."""
    found: list[tuple[str, str]] = []
    while len(found) < count:
        prompt, completion = make(random)
        if _problem(prompt) not in seen:
            seen.add(_problem(prompt))
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
