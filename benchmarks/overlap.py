"""What streaming gains, beside what it could: `python -m benchmarks.overlap`, after `python -m benchmarks.speed`.

Strictly on-policy the stages of a step take turns; in streaming (`sync.max_staleness` 1) they go on side by side. Where
each has a device of its own, a step could be as short as the longest of its stages. The workers of a CPU host share its
cores, and what a step is compared with there is the sum of its stages, each measured alone, with all cores. That is no
bound: threads of one worker wait for each other at the end of every operation, two workers of one thread each do not,
so streaming may be faster than the sum. Both leave out the time in which weights travel. Idle is who has nothing to do;
who waits for a core is not.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.record import markdown, panels, publish
from benchmarks.speed.cases import FOLDER
from launch.bottleneck import bottleneck
from launch.planning.step_time import Stages

_SYSTEMS = {"gkd": "on-policy", "gkd_streaming": "streaming"}
_WORKERS = ("rollout", "teacher", "trainer")


def measure(speed: Mapping[str, Any]) -> dict[str, Any]:
    """Of every case that `benchmarks.speed` measured in streaming."""
    streamed = (case for case in speed["cases"] if "gkd_streaming" in case)
    return {"machine": speed["machine"], "cases": [gains(case) for case in streamed]}


def gains(case: Mapping[str, Any]) -> dict[str, Any]:
    """Of one case: how many times the on-policy step's speed streaming has, the sum of the stages, and the longest."""
    alone = stages_alone(case["floor"])
    on_policy_s, streaming_s = (case[system]["step_s"] for system in _SYSTEMS)
    longest = max(alone.busy_s, key=lambda worker: alone.busy_s[worker])
    return {
        "case": case["case"],
        "on_policy_s": on_policy_s,
        "streaming_s": streaming_s,
        "sum_s": alone.round_trip_s,
        "longest_s": alone.busy_s[longest],
        "longest": longest,
        "gain": on_policy_s / streaming_s,
        "sum_gain": on_policy_s / alone.round_trip_s,
        "longest_gain": on_policy_s / alone.busy_s[longest],
        "attained": (on_policy_s - streaming_s) / (on_policy_s - alone.busy_s[longest]),
        "over_sum": streaming_s / alone.round_trip_s,
        "idle": {system: idle_shares(case[system]) for system in _SYSTEMS},
    }


def stages_alone(floor: Mapping[str, float]) -> Stages:
    """What each kind of worker needs at least, from its parts measured alone."""
    return Stages(
        rollout_s=floor["rollout_s"],
        teacher_s=floor["teacher_s"],
        train_s=floor["train_s"] + floor["optimizer_s"],
        sync_s=0.0,
    )


def idle_shares(run: Mapping[str, float]) -> dict[str, float]:
    """Stage -> share of the time in which it had nothing to do, from the medians of a run's steps."""
    line = {f"time/{name}": seconds for name, seconds in run.items() if name.endswith("_s")}
    line["sync/seconds"] = run["sync_s"]
    found = bottleneck([line, line])  # the waits in a line are of the step before, here one like it
    assert found is not None
    return found.idle


def table(found: Mapping[str, Any]) -> list[str]:
    """A row for each case: seconds, what streaming gains and what its stages alone would, and who had nothing to do."""
    head = [
        "case",
        "on-policy s",
        "streaming s",
        "sum of the stages, each alone with all cores s",
        "longest stage s",
        "streaming gains",
        "the sum would",
        "the longest, on devices of their own, would",
        "attained of what that would save",
        "streaming over the sum",
        *(f"{worker} idle: on-policy, streaming" for worker in _WORKERS),
    ]
    rows = [
        [
            case["case"],
            f"{case['on_policy_s']:.3f}",
            f"{case['streaming_s']:.3f}",
            f"{case['sum_s']:.3f}",
            f"{case['longest_s']:.3f} ({case['longest']})",
            f"{case['gain']:.2f}x",
            f"{case['sum_gain']:.2f}x",
            f"{case['longest_gain']:.2f}x",
            f"{case['attained']:.0%}",
            f"{case['over_sum']:.2f}",
            *(", ".join(f"{case['idle'][system][worker]:.0%}" for system in _SYSTEMS) for worker in _WORKERS),
        ]
        for case in found["cases"]
    ]
    return markdown(head, rows)


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Steps of every case beside its stages alone, over the on-policy step; and who has nothing to do in streaming."""
    cases = found["cases"]
    names = [case["case"].replace("_", "\n") for case in cases]
    bars = {
        "on_policy_s": "on-policy",
        "streaming_s": "streaming",
        "sum_s": "sum of the stages, each with all cores",
        "longest_s": "longest stage alone",
    }
    with panels(path, 2, width=7) as axes:
        for number, (key, title) in enumerate(bars.items()):
            places = [place + 0.2 * number - 0.3 for place in range(len(cases))]
            axes[0].bar(places, [case[key] / case["on_policy_s"] for case in cases], 0.2, label=title)
        for number, worker in enumerate(_WORKERS):
            places = [place + 0.25 * (number - 1) for place in range(len(cases))]
            axes[1].bar(places, [case["idle"]["gkd_streaming"][worker] for case in cases], 0.25, label=worker)
        axes[0].set_ylabel("step, over the on-policy step")
        axes[1].set_ylabel("idle in streaming, share of the time")
        for panel in axes:
            panel.set_xticks(range(len(cases)), names, fontsize="small")
            panel.legend(fontsize="small", ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))


def main(
    recorded: Annotated[Path, typer.Option(help="What `benchmarks.speed` wrote.")] = FOLDER / "speed.json",
    output: Annotated[Path, typer.Option(help="Where the figures go; their picture goes beside it.")] = (
        FOLDER / "overlap.json"
    ),
) -> None:
    """Compare what streaming gained in the recorded cases with what it could."""
    if not recorded.exists():
        raise typer.BadParameter(f"{recorded} is not there: run `python -m benchmarks.speed` first")
    publish(measure(json.loads(recorded.read_text(encoding="utf-8"))), output, table=table, plot=plot)


if __name__ == "__main__":
    typer.run(main)
