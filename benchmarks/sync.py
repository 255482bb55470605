"""Weights to a rollout engine: seconds against bytes, and where they go: `python -m benchmarks.sync`.

A worker that holds a student's weights, and nothing that trains them, sends them to an engine over the `object_store`
wire, as a run does. Timed apart, each the median of several: gathering (the buckets made and dropped: of weights that
are not sharded, no byte is copied), gathering and transport (the buckets put into the object store), applying (they are
there; vLLM loads them and prepacks its layers), and the whole, in which these overlap. `copy` is what one copy of the
bytes in memory takes.
"""

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import ray
import torch
import typer

from benchmarks.record import machine, markdown, panels, publish
from benchmarks.speed.cases import FOLDER, LARGE, Shape, write_model
from benchmarks.speed.floor import engine_settings
from gkd.config.trainer import SyncConfig
from gkd.model_loading import load_causal_lm
from gkd.stages import ByStep
from launch.placement import Place
from launch.ray_session import Workers, ray_session
from rollout.rollout_actor import RolloutActor, RolloutPool
from rollout.weights.object_store import ObjectStoreSender
from trainer.trainer_actor import BatchRules, Learner
from trainer.weights import checkpoint_weights, tied_names

VOCABULARY = LARGE.vocabulary
SHAPES = {
    "11M": LARGE.student,
    "54M": LARGE.teacher,
    "184M": Shape(width=1024, layers=12, heads=16, key_value_heads=8),
    "502M": Shape(width=1536, layers=16, heads=24, key_value_heads=12),
}
"""Students by their parameters, with V = 32,000 and tied heads."""
REPEAT = {"11M": 15, "54M": 15, "184M": 7, "502M": 3}
"""How often each is measured."""
_TIMEOUT_S = 600.0
_NO_BATCHES = ByStep([(1, BatchRules("token_mean", None))])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    """Of a source."""

    model: Path
    bucket_bytes: int


@ray.remote
class _Source:
    """Sends as a trainer's first rank does; it has no optimizer, so that memory allows large students."""

    def __init__(self, settings: _Settings) -> None:
        self._model = load_causal_lm(str(settings.model), dtype="float32", init="pretrained")
        self._sender = ObjectStoreSender(bucket_bytes=settings.bucket_bytes)

    def ready(self) -> bool:
        """Returns once the model is loaded."""
        return True

    def send_weights(self) -> Any:
        """One message a bucket."""
        yield from self._sender.send(checkpoint_weights(self._model), tied_names(self._model))

    def gather_s(self) -> float:
        """Seconds that all buckets take to be made, each dropped before the next."""
        return _seconds(lambda: sum(1 for _ in self.send_weights()))

    def copy_s(self) -> float:
        """Seconds that one copy of the weights into memory that was used before takes."""
        weights = [tensor for _, tensor in checkpoint_weights(self._model)]
        targets = [torch.zeros_like(tensor) for tensor in weights]
        return _seconds(lambda: [target.copy_(tensor) for target, tensor in zip(targets, weights, strict=True)])

    def num_bytes(self) -> int:
        """Of all weights."""
        return sum(tensor.nbytes for _, tensor in checkpoint_weights(self._model))


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure_size(name: str, *, bucket_mib: float, repeat: int) -> dict[str, Any]:
    """A student of `SHAPES`: bytes, seconds of each part, and the whole over the applying alone."""
    folder = FOLDER / "sync" / name
    if not (folder / "model.safetensors").exists():
        write_model(folder, SHAPES[name], VOCABULARY)
    settings = engine_settings(folder, vocabulary=VOCABULARY, prompt_tokens=16, new_tokens=16)
    with Workers([Place("trainer", 1, 0), Place("rollout", 1, 0)]) as workers:
        source = workers.start("trainer", _Source, _Settings(model=folder, bucket_bytes=int(bucket_mib * 2**20)))
        engine = workers.start("rollout", RolloutActor, settings)
        workers.wait_ready(_TIMEOUT_S)
        learner = Learner([source], rules=_NO_BATCHES, tokens_per_micro_batch=1, timeout_s=_TIMEOUT_S)
        pool = RolloutPool([engine], max_concurrent=1, timeout_s=_TIMEOUT_S)
        ways: dict[str, Callable[[], float]] = {
            "copy_s": lambda: ray.get(source.copy_s.remote()),
            "gather_s": lambda: ray.get(source.gather_s.remote()),
            "put_s": lambda: _seconds(lambda: list(learner.publish())),
            "apply_s": lambda: _apply_s(pool, list(learner.publish())),
            "whole_s": lambda: _seconds(lambda: pool.update_weights(1, learner.publish())),
        }
        rounds = [{way: timed() for way, timed in ways.items()} for _ in range(1 + repeat)]
        found = {way: statistics.median(each[way] for each in rounds[1:]) for way in ways}  # the first one allocates
        num_bytes = ray.get(source.num_bytes.remote())
    return {
        "student": name,
        "bytes": num_bytes,
        "bucket_mib": bucket_mib,
        **found,
        "sync_over_apply": found["whole_s"] / found["apply_s"],
    }


def _apply_s(pool: RolloutPool, messages: Sequence[Any]) -> float:
    """Seconds of an update whose buckets all lie in the object store already."""
    return _seconds(lambda: pool.update_weights(1, iter(messages)))


def table(found: Mapping[str, Any]) -> list[str]:
    """A row for each student."""
    head = [
        "student",
        "MB",
        "one copy (s)",
        "gathering",
        "and transport",
        "applying alone",
        "the whole",
        "whole / applying",
    ]
    rows = [
        [
            row["student"],
            f"{row['bytes'] / 1e6:.0f}",
            *(f"{row[way]:.3f}" for way in ("copy_s", "gather_s", "put_s", "apply_s", "whole_s")),
            f"{row['sync_over_apply']:.2f}",
        ]
        for row in found["students"]
    ]
    return markdown(head, rows)


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Seconds over bytes."""
    students = found["students"]
    with panels(path, 1, width=7) as (panel,):
        for way, label in (
            ("copy_s", "one copy in memory"),
            ("gather_s", "gathering"),
            ("put_s", "gathering and transport"),
            ("apply_s", "applying alone (vLLM)"),
            ("whole_s", "the whole sync"),
        ):
            megabytes = [row["bytes"] / 1e6 for row in students]
            panel.plot(megabytes, [row[way] for row in students], "o-", label=label)
        panel.set(xscale="log", yscale="log", xlabel="weights (MB)", ylabel="seconds")
        panel.grid(alpha=0.3)
        panel.legend()


def main(
    student: Annotated[list[str] | None, typer.Option(help="Measure these alone.")] = None,
    bucket_mib: Annotated[float, typer.Option(help="Size of a bucket.")] = SyncConfig().bucket_mib,
    repeat: Annotated[int | None, typer.Option(help=f"Times that each is measured; if not given, {REPEAT}.")] = None,
    output: Annotated[Path, typer.Option(help="File of the numbers; the plot goes beside it.")] = FOLDER / "sync.json",
) -> None:
    """Measure the weight sync."""
    unknown = sorted(set(student or ()) - SHAPES.keys())
    if unknown:
        raise typer.BadParameter(f"{unknown[0]} is no student: use some of {', '.join(SHAPES)}")
    found = []
    with ray_session():
        for name in student or SHAPES:
            found.append(measure_size(name, bucket_mib=bucket_mib, repeat=repeat or REPEAT[name]))
            print(f"{name}: {found[-1]['whole_s']:.3f} s, applying alone {found[-1]['apply_s']:.3f} s", flush=True)
    publish({"machine": machine(), "students": found}, output, table=table, plot=plot)


if __name__ == "__main__":
    typer.run(main)
