"""One training rank's optimizer step, through DeepSpeed, time and memory: `python -m benchmarks.train_step`.

    python -m benchmarks.train_step --device cuda --output outputs/bench/train_step_cuda.json

What a run's trainer does between two batches: forward, both heads and their divergence (JSD 0.5), backward, clipping
and AdamW, on a batch whose samples come with the teacher's hidden states. Weights, tokens and states are random. Every
way is a process of its own; the memory of all of it, weights and optimizer included, stands beside what `gkd plan`
says.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import typer

from benchmarks.record import machine, markdown, panels, publish
from benchmarks.speed.cases import FOLDER, LARGE, Pair, Shape, model_config
from gkd.arrays import to_array
from gkd.config import Config, parse_config
from gkd.head import Finish, HeadWeights
from gkd.signals import HiddenStates
from gkd.stages import ByStep
from gkd.types import Rollout, SampleId, ScoredRollout
from launch.planning.plan import make_plan
from launch.planning.request import PlanRequest
from trainer.deepspeed_engine import EngineSettings
from trainer.share import share_out
from trainer.stage import StageSettings
from trainer.student import Student, StudentSettings

Device = Literal["cpu", "cuda"]
SIZES: dict[Device, dict[str, Any]] = {
    "cpu": {"pair": LARGE, "batch": 16, "prompt_tokens": 12, "new_tokens": 128, "teacher_dtype": "float32"},
    "cuda": {
        "pair": Pair(
            name="152k",
            vocabulary=151_936,
            student=Shape(width=1024, layers=24, heads=16, key_value_heads=8),
            teacher=Shape(width=2048, layers=28, heads=16, key_value_heads=8),
        ),
        "batch": 32,
        "prompt_tokens": 512,
        "new_tokens": 512,
        "teacher_dtype": "bfloat16",
    },
}
"""11 M with a teacher of 54 M on CPUs; half a billion with one of 2 billion on a GPU."""
WAYS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32, ZeRO 2": {"zero_stage": 2},
    "float32, activations again": {"gradient_checkpointing": True},
    "bfloat16": {"dtype": "bfloat16"},
}
"""Name -> what it changes in the config's section `trainer`."""
_WARM_UP, _STEPS = 1, 3
_MOST_DISAGREEMENT = {"float32": 1e-4, "bfloat16": 3e-2}
"""Of the losses of a precision with those of the first way, relative."""
_ENVIRONMENT = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"}
"""Of a rank that is alone."""


def config_of(way: str, device: Device) -> Config:
    """The run whose trainer is measured; its models are config files alone, and its data is not there."""
    size = SIZES[device]
    folder = FOLDER / f"train_step_{size['pair'].name}"
    return parse_config(
        {
            "run": {"name": "train_step", "output_dir": str(folder / "run")},
            "student": {"model": str(folder / "student"), "init": "random"},
            "teacher": {"model": str(folder / "teacher"), "dtype": size["teacher_dtype"], "signal": "hidden_states"},
            "data": {"train": {"path": str(folder / "none.jsonl")}, "max_prompt_tokens": size["prompt_tokens"]},
            "rollout": {"max_new_tokens": size["new_tokens"]},
            "objective": {"type": "distill", "divergence": {"type": "generalized_jsd", "beta": 0.5}},
            "trainer": {"max_steps": 10, "batch_size": size["batch"], "learning_rate": 1e-4} | WAYS[way],
        }
    )


def write_shapes(device: Device) -> None:
    """The config files of both models."""
    size, config = SIZES[device], config_of("float32", device)
    positions = size["prompt_tokens"] + size["new_tokens"]
    for model, shape in (
        (config.student.model, size["pair"].student),
        (config.all_teachers[0].model, size["pair"].teacher),
    ):
        named = model_config(shape, size["pair"].vocabulary, positions=positions)
        named.architectures = ["LlamaForCausalLM"]
        named.save_pretrained(model)


def scored_batch(device: Device) -> list[ScoredRollout]:
    """Samples of random tokens with random hidden states of the teacher, which are as its signals come."""
    size = SIZES[device]
    random = torch.Generator().manual_seed(0)
    vocabulary, width = size["pair"].vocabulary, size["pair"].teacher.width
    dtype = getattr(torch, size["teacher_dtype"])

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(2, vocabulary, (count,), generator=random).tolist())

    return [
        ScoredRollout(
            rollout=Rollout(
                id=SampleId(0, number, 0),
                prompt_ids=tokens(size["prompt_tokens"]),
                response_ids=tokens(size["new_tokens"]),
                stop_reason="length",
                source="student",
                versions=(0, 0),
            ),
            signal=HiddenStates(to_array(torch.randn(size["new_tokens"], width, generator=random).to(dtype))),
        )
        for number in range(size["batch"])
    ]


def student_of(config: Config, device: Device) -> Student:
    """The rank, with the head of its teacher."""
    pair, trainer = SIZES[device]["pair"], config.trainer
    stage = StageSettings(
        objective=config.objective,
        learning_rate=trainer.learning_rate,
        lr_schedule=trainer.lr_schedule,
        warmup_steps=trainer.warmup_steps,
        steps=trainer.max_steps,
    )
    bucket_bytes = int(config.sync.bucket_mib * 2**20)
    student = Student(
        StudentSettings(
            model=config.student.model,
            init="random",
            seed=0,
            dropout=False,
            lora=None,
            gradient_checkpointing=trainer.gradient_checkpointing,
            rows=pair.vocabulary,
            stages=ByStep([(trainer.max_steps, stage)]),
            base_is_teacher=False,
            ema_decay=None,
            engine=EngineSettings(
                zero_stage=trainer.zero_stage,
                grad_clip=trainer.grad_clip,
                weight_decay=trainer.weight_decay,
                betas=trainer.betas,
                dtype=trainer.dtype,
            ),
            sender="rollout.weights.object_store:ObjectStoreSender",
            sender_kwargs={"bucket_bytes": bucket_bytes},
            bucket_bytes=bucket_bytes,
        )
    )
    dtype = getattr(torch, SIZES[device]["teacher_dtype"])
    head_VH = torch.randn(pair.vocabulary, pair.teacher.width).mul_(pair.teacher.width**-0.5).to(dtype)
    student.take_heads({"teacher": HeadWeights(to_array(head_VH), None, Finish())})
    return student


def measure_way(way: str, device: Device) -> dict[str, Any]:
    """In this process: seconds of a step (median), the most bytes that the process held (on a GPU, of its memory), and
    what a plan says of them."""
    os.environ.update(_ENVIRONMENT | os.environ)
    config, batch = config_of(way, device), scored_batch(device)
    student = student_of(config, device)
    (share,) = share_out(
        [sample.rollout for sample in batch],
        num_ranks=1,
        tokens_per_micro_batch=config.trainer.tokens_per_micro_batch,
        reduction=config.objective.reduction,
    )
    seconds, losses = [], []
    for number in range(1, 1 + _WARM_UP + _STEPS):
        start = time.perf_counter()
        losses.append(student.step(number, batch, share).loss)  # it is a number, so the device is done
        seconds.append(time.perf_counter() - start)
    plan = make_plan(config, PlanRequest(on_cpu=device == "cpu"))
    (trainer,) = (need for need in plan.needs if need.worker == "trainer")
    return {
        "way": way,
        "step_s": statistics.median(seconds[_WARM_UP:]),
        "step_seconds": seconds[_WARM_UP:],
        "losses": losses,
        "held_bytes": _held_at_most(device),
        "planned_bytes": trainer.num_bytes,
    }


def _held_at_most(device: Device) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(device: Device) -> dict[str, Any]:
    """Measure every way, each in a process of its own.

    Raises:
        RuntimeError: if one fails.
        ValueError: if they do not find the same losses.
    """
    write_shapes(device)
    rows = []
    for way in WAYS:
        command = [sys.executable, "-m", "benchmarks.train_step", f"--device={device}", f"--way={way}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{way} ended with code {done.returncode}:\n{done.stderr[-3000:]}")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{way}: {rows[-1]['step_s']:.3f} s, {rows[-1]['held_bytes'] / 1e9:.2f} GB", flush=True)
        _check(rows[0], rows[-1])
    gpu = {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}
    size = SIZES[device]
    tokens = size["batch"] * (size["prompt_tokens"] + size["new_tokens"])
    return {"machine": machine() | gpu, "tokens": tokens, "ways": rows}


def _check(first: Mapping[str, Any], row: Mapping[str, Any]) -> None:
    limit = _MOST_DISAGREEMENT["bfloat16" if row["way"].startswith("bfloat16") else "float32"]
    if any(
        abs(ours - theirs) > limit * abs(theirs) for ours, theirs in zip(row["losses"], first["losses"], strict=True)
    ):
        raise ValueError(f"{first['way']} and {row['way']} learn different things: {first['losses']}, {row['losses']}")


def table(found: Mapping[str, Any]) -> list[str]:
    """A row for each way."""
    head = ["way", "step (s)", "fastest, slowest", "tokens/s", "held (GB)", "planned (GB)", "planned over held"]
    rows = [
        [
            row["way"],
            f"{row['step_s']:.3f}",
            f"{min(row['step_seconds']):.3f}, {max(row['step_seconds']):.3f}",
            f"{found['tokens'] / row['step_s']:,.0f}",
            f"{row['held_bytes'] / 1e9:.2f}",
            f"{row['planned_bytes'] / 1e9:.2f}",
            f"{row['planned_bytes'] / row['held_bytes']:.2f}",
        ]
        for row in found["ways"]
    ]
    return markdown(head, rows)


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Seconds and memory of every way, planned memory beside."""
    rows: Sequence[Mapping[str, Any]] = found["ways"]
    places = range(len(rows))
    with panels(path, 2, width=5.5) as (left, right):
        left.bar(places, [row["step_s"] for row in rows], 0.5)
        for place, row in zip(places, rows, strict=True):
            left.vlines(place, min(row["step_seconds"]), max(row["step_seconds"]), color="black")
        left.set_ylabel("seconds of a step")
        right.bar([place - 0.2 for place in places], [row["held_bytes"] / 1e9 for row in rows], 0.4, label="held")
        right.bar([place + 0.2 for place in places], [row["planned_bytes"] / 1e9 for row in rows], 0.4, label="planned")
        right.set_ylabel("GB")
        right.legend()
        for panel in (left, right):
            panel.set_xticks(places, [row["way"].replace(", ", ",\n") for row in rows])


def main(
    device: Annotated[Device, typer.Option(help="Where the rank runs.")] = "cpu",
    way: Annotated[str | None, typer.Option(help="Measure this alone, here, and print it as JSON.")] = None,
    output: Annotated[Path, typer.Option(help="Where the figures go; their picture goes beside it.")] = (
        FOLDER / "train_step.json"
    ),
) -> None:
    """Measure one rank's optimizer step."""
    if way is None:
        publish(measure(device), output, table=table, plot=plot)
    elif way in WAYS:
        print(json.dumps(measure_way(way, device)))
    else:
        raise typer.BadParameter(f"{way} is no way: use one of {', '.join(WAYS)}")


if __name__ == "__main__":
    typer.run(main)
