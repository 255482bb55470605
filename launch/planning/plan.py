"""A run on paper: its memory, bytes and seconds, and a split of the devices over its workers. Starts nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gkd.config import Config
from gkd.errors import UserError
from launch.memory import GIB, Need, Sizes, estimate
from launch.placement import Place, needed_places
from launch.planning.advice import advise, under_way_of
from launch.planning.rates import MeasuredRun, rates_by_arithmetic, rates_of_run, read_run, refuse_other_run
from launch.planning.request import PlanRequest
from launch.planning.sizes import plan_sizes
from launch.planning.split import Kind, best_split
from launch.planning.step_time import Bound, Stages, bound_by, enough_under_way, step_seconds
from launch.planning.workload import (
    Rates,
    Split,
    Workload,
    other_devices,
    split_devices,
    split_of,
    stages_of,
    sync_bytes,
    wire_bytes,
    with_split,
    workload_of,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """The step of one split."""

    split: Split
    """The workers."""
    devices: int
    """Those of all workers."""
    stages: Stages
    """Seconds of each kind of worker."""
    step_s: float
    """The step, at the config's staleness."""
    bound: Bound
    """What it waits for."""
    on_policy_s: float
    """The step at staleness 0, where the stages take turns."""
    streaming_s: float
    """The step with as many batches under way as help."""
    streaming_staleness: int
    """The `sync.max_staleness` that this takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What was found."""

    places: Sequence[Place]
    """Of all workers, in the suggested split where there is one."""
    needs: Sequence[Need]
    """Memory of each kind of these workers."""
    wires: dict[str, float]
    """Wire -> bytes a step."""
    timings: dict[str, Timing]
    """`config`: as configured; `suggested`: the best split. Empty without rates."""
    measured_step_s: float | None
    """Median step of the run that rates are from."""
    recomposed_step_s: float | None
    """The same, composed of its stages."""
    advice: Sequence[str]
    """What that run's waits say."""
    assumptions: Sequence[str]
    """Everything that was taken for granted."""


def make_plan(config: Config, request: PlanRequest) -> Plan:
    """Plan the last stage of a run; memory is of the stage that needs most.

    Raises:
        UserError: for the first thing that is wrong in config, models, data or request, or if workers do not fit.
    """
    stage = config.parts[-1]
    run = read_run(request.run) if request.run else None
    if run is not None:
        refuse_other_run(stage, run)
    known = plan_sizes(config)
    work, about_lengths = _workload(stage, request, known.prompt_tokens, run)
    rates, about_rates = _rates(stage, request, work, known.sizes, run)
    timings: dict[str, Timing] = {}
    chosen = config
    if rates is not None:
        timings["config"] = _timing(stage, work, split_of(stage), rates)
        if request.devices is not None:
            split = _suggested(stage, work, rates, known.sizes, request)
            timings["suggested"] = _timing(stage, work, split, rates)
            chosen = with_split(stage if config.stages else config, split)
    needs = estimate(chosen, known.sizes, on_gpu=not request.on_cpu)
    if request.device_memory_gib is not None:
        _refuse_too_large(needs, request.device_memory_gib)
    return Plan(
        places=_places(chosen, on_cpu=request.on_cpu),
        needs=needs,
        wires=wire_bytes(stage, work, known.sizes),
        timings=timings,
        measured_step_s=run.step_s if run else None,
        recomposed_step_s=step_seconds(run.stages, batches_under_way=under_way_of(run.config)) if run else None,
        advice=advise(run) if run else (),
        assumptions=[
            *(["times and bytes are of the last stage"] if config.stages else []),
            *([] if request.prompt_tokens else known.assumptions),
            *about_lengths,
            *about_rates,
        ],
    )


def _places(config: Config, *, on_cpu: bool) -> list[Place]:
    places = needed_places(config)
    return [replace(place, num_gpus=0) for place in places] if on_cpu else places


def _workload(
    config: Config, request: PlanRequest, prompt_tokens: float, run: MeasuredRun | None
) -> tuple[Workload, list[str]]:
    """The work of a step, and what was assumed of it."""
    notes = []
    response_tokens = request.response_tokens or (run.response_tokens if run else None)
    if response_tokens is None:
        response_tokens = float(config.rollout.max_new_tokens)
        notes.append(f"every response has {config.rollout.max_new_tokens:,} tokens (rollout.max_new_tokens)")
    return workload_of(
        config, prompt_tokens=request.prompt_tokens or prompt_tokens, response_tokens=response_tokens
    ), notes


def _rates(
    config: Config, request: PlanRequest, work: Workload, sizes: Sizes, run: MeasuredRun | None
) -> tuple[Rates | None, list[str]]:
    """Rates and where they are from; None where none are known. What is given comes first, then the run's."""
    notes, rates = [], Rates(rollout=None, teacher=None, train=None, sync_s=None)
    if run is not None:
        rates = rates_of_run(run)
        notes.append(f"rates are medians of {len(run.lines)} steps of {request.run}, per worker while it was busy")
    elif request.peak_tflops is not None and request.utilisation is not None:
        of_engines = request.rollout_utilisation or request.utilisation
        rates = rates_by_arithmetic(
            config,
            work,
            sizes,
            peak_flops=request.peak_tflops * 1e12,
            utilisation=request.utilisation,
            rollout_utilisation=of_engines,
        )
        notes.append(
            f"rates are arithmetic: {request.peak_tflops:g} TFLOP/s a device, of which teachers and trainer reach "
            f"{request.utilisation:.0%} and engines {of_engines:.0%}; 2 operations per parameter and token forward, 4 "
            "backward, without attention"
        )
    given = {
        "rollout": request.rollout_tokens_per_s,
        "teacher": request.teacher_tokens_per_s,
        "train": request.train_tokens_per_s,
        "sync_s": sync_bytes(config, sizes) / request.sync_bytes_per_s if request.sync_bytes_per_s else None,
    }
    rates = replace(rates, **{name: value for name, value in given.items() if value is not None})
    split = split_of(config)
    needed = {"rollout": split.engines, "teacher": split.teachers, "train": split.ranks}
    missing = [name for name, number in needed.items() if number and getattr(rates, name) is None]
    if len(missing) == sum(1 for number in needed.values() if number):
        return None, []
    if missing:
        raise UserError(
            f"--{missing[0]}-tokens-per-s", None, "is missing, and other rates are given.", "Give all, or a --run."
        )
    notes.append("a worker is as fast with few sequences as with many, and all workers have devices of their own")
    if rates.sync_s is None and config.needs_rollouts:
        notes.append("a weight sync takes no time: --sync-bytes-per-s says how fast its wire is")
    return rates, notes


def _timing(config: Config, work: Workload, split: Split, rates: Rates) -> Timing:
    stages, under_way = stages_of(config, work, split, rates), under_way_of(config)
    enough = enough_under_way(stages)
    return Timing(
        split=split,
        devices=split_devices(config, split) + other_devices(config),
        stages=stages,
        step_s=step_seconds(stages, batches_under_way=under_way),
        bound=bound_by(stages, batches_under_way=under_way),
        on_policy_s=step_seconds(stages, batches_under_way=1),
        streaming_s=step_seconds(stages, batches_under_way=enough),
        streaming_staleness=enough - 2 + config.sync.every_steps,
    )


def _suggested(config: Config, work: Workload, rates: Rates, sizes: Sizes, request: PlanRequest) -> Split:
    assert request.devices is not None
    limit = request.device_memory_gib

    def fits(kind: Kind, split: Split) -> bool:
        if limit is None:
            return True
        needs = estimate(with_split(config, split), sizes, on_gpu=not request.on_cpu)
        return not _too_large([need for need in needs if need.worker.split(" ")[0] in _WORKERS[kind]], limit)

    split = best_split(config, work, rates, devices=request.devices, fits=fits)
    if split is None:
        raise UserError(
            "--devices",
            request.devices,
            "are too few for a worker of each kind" + (f", each with {limit:g} GiB." if limit is not None else "."),
            "Give more of them, or larger ones, or lower what `gkd plan` without --devices shows of the memory.",
        )
    return split


_WORKERS: dict[Kind, tuple[str, ...]] = {
    "engines": ("rollout", "teacher_rollout"),
    "teachers": ("teacher",),
    "ranks": ("trainer",),
}
"""Kind of worker in a split -> what placement calls it."""


def _too_large(needs: Sequence[Need], limit_gib: float) -> list[Need]:
    """Workers that need more than a device has; host memory is no device's."""
    return [need for need in needs if need.worker != "object store" and need.num_bytes > limit_gib * GIB]


def _refuse_too_large(needs: Sequence[Need], limit_gib: float) -> None:
    for need in _too_large(needs, limit_gib):
        part = max(need.parts, key=lambda part: need.parts[part])
        raise UserError(
            "--device-memory-gib",
            limit_gib,
            f"is too little for the {need.worker}, which needs {need.num_bytes / GIB:.1f} GiB, "
            f"{need.parts[part] / GIB:.1f} of them for its {part}.",
            _CURES.get(need.worker.split(" ")[0], "Use a smaller model, or larger devices."),
        )


_CURES = {
    "trainer": "Raise trainer.zero_stage or num_ranks, set gradient_checkpointing, or lower tokens_per_micro_batch.",
    "rollout": "Raise rollout.tensor_parallel_size or num_actors, or lower max_concurrent.",
    "teacher": "Set the backend vllm and raise its tensor_parallel_size, or lower tokens_per_batch.",
    "teacher_rollout": "Raise the teacher's tensor_parallel_size or num_actors, or lower max_concurrent.",
}
"""Worker -> what makes it smaller."""
