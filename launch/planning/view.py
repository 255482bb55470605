"""`gkd plan`: a plan as tables, or as one JSON object."""

import json
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gkd.config import Config
from launch.planning.plan import Plan, Timing, make_plan
from launch.planning.request import PlanRequest
from launch.worker_table import worker_table

_WITHOUT_RATES = (
    "Times and a split of devices need rates: --run DIR of a finished run; or --rollout-tokens-per-s, "
    "--teacher-tokens-per-s and --train-tokens-per-s; or --peak-tflops with --utilisation."
)
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def run_plan(config: Config, request: PlanRequest, console: Console, *, as_json: bool) -> None:
    """Plan a run and show it: as tables, or as one JSON object.

    Raises:
        UserError: as `make_plan`.
    """
    plan = make_plan(config, request)
    if as_json:
        console.print(plan_json(plan), soft_wrap=True, highlight=False, markup=False)
    else:
        show_plan(config, plan, console)


def plan_json(plan: Plan) -> str:
    """Everything in one object; sizes in bytes, times in seconds."""
    found: dict[str, Any] = {
        "workers": [asdict(need) | {"num_bytes": need.num_bytes} for need in plan.needs],
        "wires": plan.wires,
        "splits": {name: asdict(timing) for name, timing in plan.timings.items()},
        "measured_step_s": plan.measured_step_s,
        "recomposed_step_s": plan.recomposed_step_s,
        "advice": list(plan.advice),
        "assumptions": list(plan.assumptions),
    }
    return json.dumps(found)


def show_plan(config: Config, plan: Plan, console: Console) -> None:
    """Three tables, what a run's waits say, and all assumptions."""
    console.print(worker_table(plan.places, plan.needs))
    console.print(_wires(plan))
    if plan.timings:
        console.print(_splits(config, plan))
    else:
        console.print(_WITHOUT_RATES, highlight=False, soft_wrap=True)
    for sentence in plan.advice:
        console.print(escape(sentence), highlight=False, soft_wrap=True)
    if plan.measured_step_s and plan.recomposed_step_s:
        console.print(
            f"checked: the run's steps took {plan.measured_step_s:.3g} s, its stages as composed here make "
            f"{plan.recomposed_step_s:.3g} s ({plan.recomposed_step_s / plan.measured_step_s - 1:+.0%})",
            highlight=False,
            soft_wrap=True,
        )
    for assumption in plan.assumptions:
        console.print(f"[yellow]assumed:[/] {escape(assumption)}", highlight=False, soft_wrap=True)


def _wires(plan: Plan) -> Table:
    table = Table("wire", "a step", title="bytes between workers", caption="each thing counted once")
    for wire, size in plan.wires.items():
        table.add_row(wire, _size(size))
    return table


def _size(num_bytes: float) -> str:
    unit = 0
    while num_bytes >= 1024 and unit < len(_UNITS) - 1:
        num_bytes, unit = num_bytes / 1024, unit + 1
    return f"{num_bytes:.3g} {_UNITS[unit]}" if num_bytes < 999.5 else f"{num_bytes:.0f} {_UNITS[unit]}"


def _splits(config: Config, plan: Plan) -> Table:
    """One column for each split."""
    table = Table("", *plan.timings, title="an optimizer step, in seconds")
    staleness = config.sync.max_staleness
    rows = {
        "engines : teachers : ranks": lambda t: f"{t.split.engines} : {t.split.teachers} : {t.split.ranks}",
        "devices": lambda t: f"{t.devices:,}",
        "rollouts": lambda t: _seconds(t.stages.rollout_s),
        "teacher": lambda t: _seconds(t.stages.teacher_s),
        "trainer": lambda t: _seconds(t.stages.train_s),
        "weight sync": lambda t: _seconds(t.stages.sync_s),
        f"step at max_staleness {staleness}": lambda t: f"{_seconds(t.step_s)}, {_bound(t)}",
        "step at max_staleness 0": lambda t: _seconds(t.on_policy_s),
        "shortest in streaming": lambda t: f"{_seconds(t.streaming_s)}, at max_staleness {t.streaming_staleness}",
    }
    for name, cell in rows.items():
        table.add_row(name, *(cell(timing) for timing in plan.timings.values()))
    return table


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.3g}" if seconds else "-"


def _bound(timing: Timing) -> str:
    names = {"rollout": "bound by rollouts", "teacher": "bound by the teacher", "trainer": "bound by the trainer"}
    return names.get(timing.bound, "bound by the round trip")
