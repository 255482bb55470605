"""What a token costs when runs grow: `python -m benchmarks.growth`.

One strictly on-policy step of gkd is made larger along one axis at a time, all else as in one base case: the batch, the
length of responses, the vocabulary, the models, the number of engines, teachers and training ranks. Each case is a run
of `gkd train` in processes of its own (`benchmarks.speed.ours`). Where a step's cost grows as its number of tokens
does, a token costs the same: along batch and workers (which share the cores of a CPU host) a flat line is what can be
had. Attention makes longer responses dearer, and of vocabulary and models arithmetic alone allows a line that rises
with the size.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import typer

from benchmarks.record import machine, markdown, panels, publish
from benchmarks.speed.cases import FOLDER, Case, Pair, Shape, write_inputs
from benchmarks.speed.ours import WORKERS
from benchmarks.speed.systems import run_system

STAGES = ("rollout", "teacher", "train", "sync")
"""What a step is made of. Scoring begins while others still generate, so their sum may be more than the step."""

_MODELS = (
    (
        Shape(width=96, layers=2, heads=3, key_value_heads=3),
        Shape(width=192, layers=5, heads=6, key_value_heads=3),
    ),
    (
        Shape(width=192, layers=5, heads=6, key_value_heads=3),
        Shape(width=384, layers=7, heads=6, key_value_heads=3),
    ),
    (
        Shape(width=320, layers=7, heads=10, key_value_heads=5),
        Shape(width=576, layers=10, heads=9, key_value_heads=3),
    ),
)
"""Students of 1.0, 3.8 and 11 M parameters over the base's vocabulary, and their teachers."""


def _pair(vocabulary: int, models: tuple[Shape, Shape]) -> Pair:
    student, teacher = models
    return Pair(name=f"{vocabulary}x{student.width}", vocabulary=vocabulary, student=student, teacher=teacher)


BASE = Case(
    name="growth_base",
    pair=_pair(8192, _MODELS[1]),
    batch=16,
    prompt_tokens=(12, 12),
    new_tokens=(128, 128),
    warm_up=1,
    steps=2,
)
"""Where all axes meet."""
SIZES: dict[str, Callable[[Case], int]] = {
    "batch": lambda case: case.batch,
    "response": lambda case: case.new_tokens[1],
    "vocabulary": lambda case: case.pair.vocabulary,
    "student": lambda case: case.pair.student.parameters(case.pair.vocabulary),
    "engines": lambda case: case.rollout_actors,
    "teachers": lambda case: case.teacher_actors,
    "ranks": lambda case: case.ranks,
}
"""Axis -> how large a case is along it."""
_TITLES = {
    "batch": "sequences of a step",
    "response": "tokens of a response",
    "vocabulary": "rows of the vocabulary",
    "student": "parameters of the student",
    "engines": "rollout engines",
    "teachers": "teacher workers",
    "ranks": "training ranks",
}


def along(axis: str, changes: Iterable[Mapping[str, Any]], *, base: Case) -> list[Case]:
    """The base case with each of the changes, named after its size; one that changes nothing is the base itself."""
    cases = [replace(base, **change) for change in changes]
    return [case if case == base else replace(case, name=f"growth_{axis}_{SIZES[axis](case)}") for case in cases]


AXES: dict[str, list[Case]] = {
    axis: along(axis, changes, base=BASE)
    for axis, changes in {
        "batch": [{"batch": size} for size in (16, 32, 64)],
        "response": [{"new_tokens": (size, size)} for size in (128, 256)],
        "vocabulary": [{"pair": _pair(size, _MODELS[1])} for size in (2048, 8192, 32_768)],
        "student": [{"pair": _pair(8192, models)} for models in _MODELS],
        "engines": [{"rollout_actors": number} for number in (1, 2)],
        "teachers": [{"teacher_actors": number} for number in (1, 2)],
        "ranks": [{"ranks": number} for number in (1, 2)],
    }.items()
}


def measure(axes: Mapping[str, Sequence[Case]], report: Callable[[str], None]) -> dict[str, Any]:
    """Run the cases of all axes, each once, and tell of each."""
    runs: dict[str, dict[str, Any]] = {}
    points: dict[str, list[dict[str, Any]]] = {axis: [] for axis in axes}
    for axis, cases in axes.items():
        for case in cases:
            if case.name not in runs:
                runs[case.name] = _run(case)
            point = {"size": SIZES[axis](case), **runs[case.name]}
            points[axis].append(point)
            report(f"{axis} {point['size']}: {point['us_per_token']:.0f} us a token, {point['step_s']:.3f} s a step")
    return {"machine": machine(), "axes": points}


def _run(case: Case) -> dict[str, Any]:
    write_inputs(case)
    found = run_system(case, "ours", "0")
    for made in ("checkpoints", "export"):  # gigabytes, of all cases; the rest is what `benchmarks.plan` reads
        shutil.rmtree(case.folder / "gkd" / made, ignore_errors=True)
    memory, vocabulary = found["memory"], case.pair.vocabulary
    return {
        "case": case.name,
        "student_parameters": case.pair.student.parameters(vocabulary),
        "teacher_parameters": case.pair.teacher.parameters(vocabulary),
        "tokens": found["tokens"],
        "step_s": found["step_s"],
        "us_per_token": 1e6 * found["step_s"] / found["tokens"],
        "stages_s": {stage: found[f"{stage}_s"] for stage in STAGES},
        "largest_bytes": memory["largest"],
        "largest_name": memory["largest_name"],
        "worker_bytes": {kind: memory["own"][process] for kind, process in WORKERS.items()},
        "over_idle_bytes": memory["peak"] - memory["idle"],
    }


def table(found: Mapping[str, Any]) -> list[str]:
    """A row for each point of each axis, the cost of a token also over that of the axis's first."""
    head = [
        "axis",
        "size",
        "student, teacher",
        "step s",
        "µs a token",
        "over the first",
        *(f"{stage} s" for stage in STAGES),
        "largest process GB",
        "all over idle GB",
    ]
    rows = [
        [
            _TITLES[axis],
            f"{point['size']:,}",
            f"{point['student_parameters'] / 1e6:.1f} M, {point['teacher_parameters'] / 1e6:.1f} M",
            f"{point['step_s']:.3f}",
            f"{point['us_per_token']:.0f}",
            f"{point['us_per_token'] / points[0]['us_per_token']:.2f}",
            *(f"{point['stages_s'][stage]:.3f}" for stage in STAGES),
            f"{point['largest_bytes'] / 1e9:.2f}",
            f"{point['over_idle_bytes'] / 1e9:.2f}",
        ]
        for axis, points in found["axes"].items()
        for point in points
    ]
    return markdown(head, rows)


def plot(found: Mapping[str, Any], path: Path) -> None:
    """A panel for each axis: the cost of a token, whole and by stage, over the size; both scales logarithmic. The
    dotted line rises as the size does."""
    with panels(path, len(found["axes"]), width=2.9, one_scale=True) as axes:
        for panel, (axis, points) in zip(axes, found["axes"].items(), strict=True):
            sizes = [point["size"] for point in points]
            panel.plot(sizes, [point["us_per_token"] for point in points], "o-", color="black", label="step")
            for stage in STAGES:
                costs = [1e6 * point["stages_s"][stage] / point["tokens"] for point in points]
                panel.plot(sizes, costs, "o-", linewidth=1, markersize=3, label=stage)
            panel.set(xscale="log", yscale="log", xlabel=_TITLES[axis])
            panel.set_xticks(sizes, [f"{size:,}" if size < 1e6 else f"{size / 1e6:.1f} M" for size in sizes])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
        axes[0].set_ylim(axes[0].get_ylim())  # of the costs, whatever the dotted lines need
        for panel, points in zip(axes, found["axes"].values(), strict=True):
            rising = [points[0]["us_per_token"] * point["size"] / points[0]["size"] for point in points]
            panel.plot([point["size"] for point in points], rising, ":", color="gray", label="as the size")
        axes[0].set_ylabel("µs per token")
        axes[0].legend(fontsize="small", ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))


def main(
    output: Annotated[Path, typer.Option(help="Where the figures go; their picture goes beside it.")] = (
        FOLDER / "growth.json"
    ),
) -> None:
    """Measure what a token costs along all axes."""
    publish(measure(AXES, print), output, table=table, plot=plot)


if __name__ == "__main__":
    typer.run(main)
