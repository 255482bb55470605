"""What a finished run's waits say, and what to change."""

from collections.abc import Mapping
from dataclasses import replace

from gkd.config import Config
from launch.bottleneck import bottleneck
from launch.planning.rates import MeasuredRun, rates_of_run
from launch.planning.step_time import (
    Bound,
    batches_under_way,
    bound_by,
    enough_under_way,
    step_seconds,
)
from launch.planning.workload import Split, split_of, stages_of, workload_of

_NAMES: dict[str, str] = {"rollout": "rollouts", "teacher": "the teacher", "trainer": "the trainer"}


def advise(run: MeasuredRun) -> list[str]:
    """Sentences: who bound the step, who waited for how much of it, what to change and what a step would then take."""
    config, stages = run.config, run.stages
    found = bottleneck(run.lines)
    idle = {worker: found.idle[worker] for worker in _NAMES if worker in found.idle} if found else {}
    under_way = under_way_of(config)
    bound = bound_by(stages, batches_under_way=under_way)
    waited = ", ".join(
        f"{_NAMES[worker]} waited {share:.0%} of it" for worker, share in idle.items() if worker != bound
    )
    if bound == "round trip":
        wanted = enough_under_way(stages)
        staleness = wanted - 2 + config.sync.every_steps
        busiest = bound_by(stages, batches_under_way=wanted)
        seconds = step_seconds(stages, batches_under_way=wanted)
        return [
            f"the round trip of a batch bounds the step of {run.step_s:.3g} s, the workers take turns: {waited}",
            f"raise sync.max_staleness from {config.sync.max_staleness} to {staleness}: about {seconds:.3g} s a step, "
            f"if all have devices of their own; then {_bounds(busiest)} it",
        ]
    return [
        f"{_bounds(bound)} the step of {run.step_s:.3g} s{': ' if waited else ''}{waited}",
        *_one_more(run, bound, under_way),
    ]


def under_way_of(config: Config) -> int:
    """Batches under way at once, by the config."""
    return batches_under_way(max_staleness=config.sync.max_staleness, every_steps=config.sync.every_steps)


def _bounds(bound: Bound) -> str:
    return f"{_NAMES[bound]} {'bound' if bound == 'rollout' else 'bounds'}"


def _one_more(run: MeasuredRun, bound: Bound, under_way: int) -> list[str]:
    """What one more worker of the busiest kind would bring."""
    config, own = run.config, split_of(run.config)
    of_each = len(config.all_teachers) or 1
    more: Mapping[Bound, tuple[str, str, Split]] = {
        "rollout": ("rollout engine", _engine_field(config), replace(own, engines=own.engines + 1)),
        "teacher": ("teacher", f"{config.teacher_fields[0]}.num_actors" if config.all_teachers else "",
                    replace(own, teachers=own.teachers + of_each)),
        "trainer": ("trainer rank", "trainer.num_ranks", replace(own, ranks=own.ranks + 1)),
    }  # fmt: skip
    name, field, split = more[bound]
    if split.ranks > config.trainer.batch_size:
        return ["every rank has one sequence: a larger trainer.batch_size makes better use of more of them"]
    work = workload_of(config, prompt_tokens=0.0, response_tokens=run.response_tokens)
    rates = rates_of_run(run)
    before = step_seconds(stages_of(config, work, own, rates), batches_under_way=under_way)
    after = step_seconds(stages_of(config, work, split, rates), batches_under_way=under_way)
    return [
        f"add a {name} on a device of its own ({field}: {_number(bound, own)} to {_number(bound, split)}): about "
        f"{run.step_s * after / before:.3g} s a step"
    ]


def _engine_field(config: Config) -> str:
    return f"{config.teacher_fields[0]}.num_actors" if config.teacher_writes else "rollout.num_actors"


def _number(bound: Bound, split: Split) -> int:
    return {"rollout": split.engines, "teacher": split.teachers, "trainer": split.ranks}[bound]
