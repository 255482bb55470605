"""What the teacher's judgement costs on its way, in every form: `python -m benchmarks.transport`.

Real teacher workers (`rollout.teacher_actor`) score groups of sequences on Ray, one worker for each form of signal, one
after the other. Of each form: bytes, and seconds until the signal is made, until it lies in the object store, and until
another worker has got it from there and read every byte. What the trainer then does with it is no part of that: it
makes logits of hidden states with the teacher's head, which it is sent once.
"""

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import ray
import typer

from benchmarks.record import machine, markdown, panels, publish
from benchmarks.speed.cases import FOLDER, LARGE, SMALL, Case, batches, write_inputs
from gkd.config.models import TeacherConfig
from gkd.signals import SignalKind
from gkd.types import Rollout, SampleId
from launch.placement import Place, available_cpus, fit_places
from launch.ray_session import Workers, ray_session
from rollout.hf_teacher import TeacherSettings
from rollout.teacher_actor import TeacherActor

SIGNALS = (
    SignalKind.FULL_LOGITS,
    SignalKind.HIDDEN_STATES,
    SignalKind.TOP_K,
    SignalKind.SAMPLED_LOGPROBS,
)
CASES = tuple(
    Case(
        name=f"transport_{pair.name}",
        pair=pair,
        batch=8,
        prompt_tokens=(12, 12),
        new_tokens=(128, 128),
        warm_up=1,
        steps=7,
    )
    for pair in (LARGE, SMALL)
)
"""Every step is one group that the teacher scores: as many sequences as `teacher.sequences_per_batch` has it."""
_DEFAULTS = TeacherConfig(model="any")
_STAGES = ("make", "store", "read")
_START_S = 300.0


@ray.remote
class Reader:
    """A worker at the other end."""

    def __init__(self, _settings: None) -> None:
        """`Workers` gives every worker settings; this one needs none."""

    def ready(self) -> bool:
        """Returns once it is up."""
        return True

    def read(self, handle: list[Any]) -> float:
        """Seconds until the signals behind the only handle of the list are here and every byte was read."""
        begun = time.perf_counter()
        for signal in ray.get(handle[0]):
            for array in arrays_of(signal):
                array.sum()
        return time.perf_counter() - begun


def arrays_of(signal: Any) -> list[np.ndarray]:
    """What a signal consists of."""
    values = (getattr(signal, field.name) for field in fields(signal))
    return [value for value in values if isinstance(value, np.ndarray)]


def rollouts(case: Case, *, student_top_k: int) -> list[list[Rollout]]:
    """Responses of random tokens to the case's prompts, a group for each step.

    With `student_top_k` each position has that many random tokens in the place of those that the student thought most
    probable, which the engines of a run record for top-k signals.
    """
    random, rows = np.random.default_rng(1), case.pair.vocabulary

    def rollout(id: SampleId, prompt_ids: tuple[int, ...], length: int) -> Rollout:
        first_T1 = random.integers(rows, size=(length, 1))
        top_ids = (first_T1 + np.arange(student_top_k) * (rows // max(student_top_k, 1))) % rows
        return Rollout(
            id=id,
            prompt_ids=prompt_ids,
            response_ids=tuple(random.integers(2, rows, length).tolist()),
            stop_reason="length",
            source="student",
            versions=(0, 0),
            top_ids=top_ids.astype(np.int32) if student_top_k else None,
        )

    return [
        [rollout(SampleId(step, place, 0), *prompt) for place, prompt in enumerate(group)]
        for step, group in enumerate(batches(case))
    ]


def measure(cases: Sequence[Case], report: Callable[[str], None]) -> dict[str, Any]:
    """Every form of signal in every case; tells of each."""
    found: list[dict[str, Any]] = []
    for case in cases:
        write_inputs(case)
    with ray_session():
        for case in cases:
            places = fit_places(
                [*(Place(kind.value, 1, 0) for kind in SIGNALS), Place("reader", 1, 0)], available_cpus(), 0
            )
            with Workers(places) as workers:
                # Each may use every core: only one works at a time.
                teachers = {kind: workers.start(kind.value, TeacherActor, _settings(case, kind)) for kind in SIGNALS}
                reader = workers.start("reader", Reader, None)
                workers.wait_ready(_START_S)
                for kind, teacher in teachers.items():
                    point = _measure(case, kind, teacher, reader)
                    found.append(point)
                    seconds = ", ".join(f"{stage} {point[f'{stage}_s']:.4f} s" for stage in _STAGES)
                    report(f"{case.pair.name} {kind}: {point['bytes_per_token']:,.0f} bytes a token; {seconds} a group")
    return {"machine": machine(), "signals": found}


def _settings(case: Case, kind: SignalKind) -> TeacherSettings:
    return TeacherSettings(
        model=str(case.folder / "teacher"),
        dtype="float32",
        rows=case.pair.vocabulary,
        signal=kind,
        top_k=_DEFAULTS.top_k,
    )


def _measure(case: Case, kind: SignalKind, teacher: Any, reader: Any) -> dict[str, Any]:
    """Medians over the groups that count, in seconds; bytes per token of a response."""
    groups = rollouts(case, student_top_k=_DEFAULTS.student_top_k if kind is SignalKind.TOP_K else 0)
    times = [_send(group, teacher, reader) for group in groups][case.warm_up :]
    tokens = sum(len(rollout.response_ids) for rollout in groups[-1])
    head = ray.get(teacher.head.remote()) if kind is SignalKind.HIDDEN_STATES else None
    return {
        "pair": case.pair.name,
        "vocabulary": case.pair.vocabulary,
        "teacher_parameters": case.pair.teacher.parameters(case.pair.vocabulary),
        "signal": kind.value,
        "tokens": tokens,
        "bytes_per_token": times[-1]["bytes"] / tokens,
        "bytes_once": 0 if head is None else sum(array.nbytes for array in arrays_of(head)),
        **{f"{stage}_s": statistics.median(time[f"{stage}_s"] for time in times) for stage in _STAGES},
    }


def _send(group: Sequence[Rollout], teacher: Any, reader: Any) -> dict[str, float]:
    """The way of one group's signals. What is not the teacher's own time until they lie in the store counts as
    storing, the call itself with it."""
    begun = time.perf_counter()
    told, signals = teacher.score.remote(group)
    ray.wait([signals], fetch_local=False)
    stored_s = time.perf_counter() - begun
    account = ray.get(told)
    read_s = ray.get(reader.read.remote([signals]))
    return {
        "make_s": account.seconds,
        "store_s": stored_s - account.seconds,
        "read_s": read_s,
        "bytes": account.num_bytes,
    }


def table(found: Mapping[str, Any]) -> list[str]:
    """A row for each form of signal."""
    head = [
        "V",
        "teacher",
        "signal",
        "bytes a token",
        "made, µs a token",
        "stored, µs a token",
        "got and read, µs a token",
        "sent once, MB",
    ]
    rows = [
        [
            f"{point['vocabulary']:,}",
            f"{point['teacher_parameters'] / 1e6:.1f} M",
            f"`{point['signal']}`",
            f"{point['bytes_per_token']:,.0f}",
            *(f"{1e6 * point[f'{stage}_s'] / point['tokens']:.1f}" for stage in _STAGES),
            f"{point['bytes_once'] / 1e6:.1f}",
        ]
        for point in found["signals"]
    ]
    return markdown(head, rows)


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Bytes, then microseconds of a token in every form; the scale of bytes is logarithmic."""
    pairs = {point["pair"]: f"V = {point['vocabulary']:,}" for point in found["signals"]}
    with panels(path, 1 + len(pairs), width=4.2) as axes:
        for number, (pair, title) in enumerate(pairs.items()):
            points = [point for point in found["signals"] if point["pair"] == pair]
            places = np.arange(len(points))
            names = [point["signal"].replace("_", "\n") for point in points]
            width = 0.8 / len(pairs)
            sizes = [point["bytes_per_token"] for point in points]
            axes[0].bar(places + (number + 0.5) * width - 0.4, sizes, width, label=title)
            axes[0].set_xticks(places, names)
            _stacked(axes[1 + number], points, names)
            axes[1 + number].set(title=title, ylabel="µs per token")
        axes[0].set(yscale="log", ylabel="bytes per token")
        axes[0].legend(fontsize="small")
        axes[-1].legend(fontsize="small")


def _stacked(panel: Any, points: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    bottom = np.zeros(len(points))
    for stage in _STAGES:
        costs = np.array([1e6 * point[f"{stage}_s"] / point["tokens"] for point in points])
        panel.bar(names, costs, bottom=bottom, label=stage)
        bottom += costs


def main(
    output: Annotated[Path, typer.Option(help="Where the figures go; their picture goes beside it.")] = (
        FOLDER / "transport.json"
    ),
) -> None:
    """Measure the way of every form of signal."""
    publish(measure(CASES, print), output, table=table, plot=plot)


if __name__ == "__main__":
    typer.run(main)
