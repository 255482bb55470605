"""`gkd plan` beside what runs took: `python -m benchmarks.plan`, after `python -m benchmarks.growth`.

The rates of one run, the one where all axes of `benchmarks.growth` meet, plan runs with other batches, other responses
and other numbers of workers; the memory of every worker is planned from shapes alone. A plan takes a worker to be as
fast with few sequences as with many, and all workers to have devices of their own: on a CPU host they share its cores,
so that what several of a kind take is not what it says.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.growth import AXES, BASE, WORKERS
from benchmarks.record import markdown, panels, publish
from benchmarks.speed.cases import FOLDER, Case
from benchmarks.speed.ours import config_tree
from gkd.config import parse_config
from launch.planning.plan import Plan, make_plan
from launch.planning.request import PlanRequest

WITHIN = 0.25
"""How far a plan may be from what a run takes, relative."""
_SHARING = ("engines", "teachers", "ranks")
"""Axes whose workers have no devices of their own here."""


def measure(grown: Mapping[str, Any]) -> dict[str, Any]:
    """Plan every case that `benchmarks.growth` measured, and set its figures beside the plan's."""
    return {"machine": grown["machine"], "base": BASE.name, "cases": list(_compared(grown))}


def _compared(grown: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    seen = set()
    for axis, cases in AXES.items():
        for case, point in zip(cases, grown["axes"][axis], strict=True):
            assert point["case"] == case.name, "growth was measured with other cases: run it again"
            if case.name not in seen:
                seen.add(case.name)
                plan = _plan(case)
                planned = {need.worker.split(" ")[0]: need.num_bytes for need in plan.needs}
                yield {
                    "case": case.name,
                    "shares_cores": axis in _SHARING and case != BASE,
                    "step_s": point["step_s"],
                    "planned_step_s": plan.timings["config"].step_s if plan.timings else None,
                    "worker_bytes": point["worker_bytes"],
                    "planned_bytes": {kind: planned[kind] for kind in WORKERS},
                }


def _plan(case: Case) -> Plan:
    """With the rates of the base run, where the models are the same."""
    run = BASE.folder / "gkd" if case.pair == BASE.pair else None
    # Its folder has the very models that the rates are of.
    config = parse_config(config_tree(replace(case, name=BASE.name) if run else case, max_staleness=0))
    return make_plan(config, PlanRequest(run=run, response_tokens=float(case.new_tokens[1]), on_cpu=True))


def table(found: Mapping[str, Any]) -> list[str]:
    """A row for each case: planned, measured, and the one over the other."""
    head = ["run", "step s", "planned", "over measured"]
    head += [heading for kind in WORKERS for heading in (f"{kind} GB", "planned", "over measured")]
    rows = []
    for case in found["cases"]:
        planned = case["planned_step_s"]
        step = [f"{planned:.2f}", f"{planned / case['step_s']:.2f}"] if planned else ["-", "-"]
        memory = [
            cell
            for kind, measured in case["worker_bytes"].items()
            for cell in (
                f"{measured / 1e9:.2f}",
                f"{case['planned_bytes'][kind] / 1e9:.2f}",
                f"{case['planned_bytes'][kind] / measured:.2f}",
            )
        ]
        name = case["case"].removeprefix("growth_") + (" (share cores)" if case["shares_cores"] else "")
        rows.append([name, f"{case['step_s']:.2f}", *step, *memory])
    return markdown(head, rows)


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Planned over measured, with a band of what was wanted."""
    cases = found["cases"]
    names = [case["case"].removeprefix("growth_") for case in cases]
    with panels(path, 2, width=6.5) as axes:
        steps = [(place, case) for place, case in enumerate(cases) if case["planned_step_s"]]
        for shares, label in ((False, "step"), (True, "step of workers that share cores")):
            shown = [
                (place, case["planned_step_s"] / case["step_s"])
                for place, case in steps
                if case["shares_cores"] == shares
            ]
            axes[0].plot(*zip(*shown, strict=True), "o", label=label)
        for kind in WORKERS:
            ratios = [case["planned_bytes"][kind] / case["worker_bytes"][kind] for case in cases]
            axes[1].plot(range(len(cases)), ratios, "o", label=f"memory of the {kind}")
        for panel in axes:
            panel.axhspan(1 - WITHIN, 1 + WITHIN, alpha=0.15, color="gray")
            panel.axhline(1, color="gray", linewidth=1)
            panel.set_xticks(range(len(cases)), names, rotation=60, ha="right", fontsize="small")
            panel.set_ylabel("planned over measured")
            panel.legend(fontsize="small", ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))


def main(
    grown: Annotated[Path, typer.Option(help="What `benchmarks.growth` wrote.")] = FOLDER / "growth.json",
    output: Annotated[Path, typer.Option(help="Where the figures go; their picture goes beside it.")] = (
        FOLDER / "plan.json"
    ),
) -> None:
    """Compare plans with what the runs of `benchmarks.growth` took."""
    if not grown.exists():
        raise typer.BadParameter(f"{grown} is not there: run `python -m benchmarks.growth` first")
    publish(measure(json.loads(grown.read_text(encoding="utf-8"))), output, table=table, plot=plot)


if __name__ == "__main__":
    typer.run(main)
