"""How fast the workers are: from a finished run, or from arithmetic and a stated utilisation."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from gkd.config import Config, load_config
from gkd.errors import UserError
from launch.memory import Sizes, head_at_trainer
from launch.planning.step_time import Stages
from launch.planning.workload import Rates, Workload, engine_devices, split_of, teacher_devices, workload_of

_WARM_UP = 2
"""Steps of a run that are left out where enough others are there: code is compiled and caches fill."""
_THE_SAME = (
    "student.model", "student.truncate", "student.lora", "trainer.dtype", "trainer.gradient_checkpointing",
    "rollout.tensor_parallel_size", "objective.type",
)  # fmt: skip
_OF_TEACHERS = ("model", "backend", "dtype", "tensor_parallel_size")
"""Config fields that a run's rates hang on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRun:
    """What a finished run tells of its steps: medians."""

    config: Config
    """The stage that was measured: the run's last."""
    lines: Sequence[Mapping[str, Any]]
    """Of `metrics.jsonl`, those of this stage, without the warm-up."""
    stages: Stages
    """Seconds that a step took of each kind of worker."""
    response_tokens: float
    """Mean length of a response."""

    @property
    def step_s(self) -> float:
        """A step."""
        return _median(self.lines, "time/step_s")


def read_run(folder: Path) -> MeasuredRun:
    """A run's own numbers.

    How long the engines wrote is what they did not wait. Where generation runs ahead of training, a sync falls into the
    time in which engines have work, except for what they waited in any case.

    Raises:
        UserError: if it is no run, or has too few steps.
    """
    if not (folder / "metrics.jsonl").exists() or not (folder / "config.yaml").exists():
        raise UserError("--run", str(folder), "is no run's folder.", "Name the run.output_dir of a finished run.")
    config = load_config(folder / "config.yaml").parts[-1]
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    lines = [line for line in lines if line.get("stage") == lines[-1].get("stage")]
    lines = lines[_WARM_UP:-1] or lines  # after a run's last step nobody waits for a batch
    if not lines:
        raise UserError("--run", str(folder), "has no step yet.", "Name a run with some steps.")
    syncs = [line["sync/seconds"] for line in lines if line["sync/seconds"] > 0]
    sync_s = median(syncs) / config.sync.every_steps if syncs else 0.0
    in_turn = Stages(
        rollout_s=_rollout_seconds(config, lines, sync_s, folder),
        teacher_s=_median(lines, "time/teacher_s") / (split_of(config).teachers or 1),
        train_s=_median(lines, "time/train_s"),
        sync_s=sync_s,
    )
    return MeasuredRun(
        config=config,
        lines=lines,
        stages=replace(in_turn, scored_meanwhile=_scored_meanwhile(config, in_turn, _median(lines, "time/step_s"))),
        response_tokens=_median(lines, "tokens/trained") / config.trainer.batch_size,
    )


def _rollout_seconds(config: Config, lines: Sequence[Mapping[str, Any]], sync_s: float, folder: Path) -> float:
    if not config.generates:
        return 0.0
    if config.sync.max_staleness == 0:
        return _median(lines, "time/rollout_s")
    idle_s = _median(lines, "time/rollout_wait_s")
    busy_s = _median(lines, "time/step_s") - idle_s - max(0.0, sync_s - idle_s)
    if busy_s <= 0:
        raise UserError(
            "--run",
            str(folder),
            "has engines that wait for longer than its steps take: evaluations or checkpoints lie between most steps.",
            "Name a run with fewer of these.",
        )
    return busy_s


def _scored_meanwhile(config: Config, in_turn: Stages, step_s: float) -> float:
    """Of a strictly on-policy run what its steps are shorter than their stages in turn, over the scoring; in streaming
    nothing tells it."""
    if config.sync.max_staleness or not (in_turn.rollout_s and in_turn.teacher_s):
        return 0.0
    return min(1.0, max(0.0, in_turn.round_trip_s - step_s) / in_turn.teacher_s)


def _median(lines: Sequence[Mapping[str, Any]], key: str) -> float:
    return float(median(line[key] for line in lines))


def refuse_other_run(config: Config, run: MeasuredRun) -> None:
    """Rates are of the models, precisions and objective that they were measured with.

    Raises:
        UserError: naming the first field that differs.
    """
    ours, theirs = config.model_dump(mode="json"), run.config.model_dump(mode="json")
    differing = [(key, _at(ours, key), _at(theirs, key)) for key in _THE_SAME]
    for field, own, other in zip(config.teacher_fields, config.all_teachers, run.config.all_teachers, strict=False):
        differing += [(f"{field}.{key}", getattr(own, key), getattr(other, key)) for key in _OF_TEACHERS]
    differing.append(("teachers", len(config.all_teachers), len(run.config.all_teachers)))
    for field, own, other in differing:
        if own != other:
            raise UserError(
                field, own, f"was {other!r} in the run that --run names.", "Set it so, or name a run of this config."
            )


def _at(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree[name]
    return tree


def rates_of_run(run: MeasuredRun) -> Rates:
    """Tokens per second of each kind of worker while it was busy, each per device."""
    config, split, stages = run.config, split_of(run.config), run.stages
    work = workload_of(config, prompt_tokens=0.0, response_tokens=run.response_tokens)
    written = _median(run.lines, "tokens/generated") / (work.prompts_written * work.samples_per_prompt or 1)
    share = work.rollout_share(split.engines) * written / run.response_tokens
    return Rates(
        rollout=_per_second(share / engine_devices(config), stages.rollout_s),
        teacher=_per_second(work.teacher_share(split.teachers) / teacher_devices(config), stages.teacher_s),
        train=_per_second(work.train_share(split.ranks), stages.train_s),
        sync_s=stages.sync_s * config.sync.every_steps,
        scored_meanwhile=stages.scored_meanwhile,
    )


def _per_second(tokens: float, seconds: float) -> float | None:
    return tokens / seconds if tokens and seconds else None


def rates_by_arithmetic(
    config: Config, work: Workload, sizes: Sizes, *, peak_flops: float, utilisation: float, rollout_utilisation: float
) -> Rates:
    """Tokens per second and device of hardware that does so many operations per second.

    A forward pass takes 2 operations for each parameter and token, a backward pass 4 (2 without the gradients of the
    weights, under an adapter); computing activations again and a teacher made of the student's weights take another
    forward pass each. The head of a teacher that sends hidden states is applied by the trainer, to response tokens.
    Attention is left out, and with it the length of the context.

    Args:
        config: of the stage.
        work: of its steps; prompts are computed too, by the engines once for all samples.
        sizes: of the models.
        peak_flops: operations per second of a device.
        utilisation: of teachers and trainer, the share of it that they reach.
        rollout_utilisation: likewise of the engines.
    """
    student = sizes.student.num_parameters + sizes.adapter
    teacher = max((model.num_parameters for model in sizes.teachers), default=0)
    scored, head = _scored_parameters(sizes, scorings=work.scorings)
    passes = 2 if sizes.adapter else 3
    passes += config.trainer.gradient_checkpointing
    passes += config.needs_teacher and not config.needs_teacher_workers
    both = (work.prompt_tokens + work.response_tokens) / work.response_tokens
    written = 1 + work.prompt_tokens / work.samples_per_prompt / work.response_tokens
    writer = teacher if config.teacher_writes else student
    speed = peak_flops * utilisation
    return Rates(
        rollout=peak_flops * rollout_utilisation / (2 * writer * written) if work.prompts_written else None,
        teacher=speed / (2 * scored * both) if scored else None,
        train=speed / (2 * (student * passes * both + head)),
        sync_s=None,
    )


def _scored_parameters(sizes: Sizes, *, scorings: int) -> tuple[int, int]:
    """Parameters that the largest teacher applies to each of its tokens, and those that the trainer applies for all
    teachers of a response token."""
    scorers = zip(sizes.teachers, sizes.signals, strict=False)
    heads = [head_at_trainer(model, signal, rows=sizes.rows) for model, signal in scorers]
    bodies = [model.num_parameters - head for model, head in zip(sizes.teachers, heads, strict=False)]
    return max(bodies, default=0), scorings * max(heads, default=0)
