"""What the measurements come to."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.record import markdown, panels

_PARTS = ("rollout_s", "teacher_s", "train_s", "optimizer_s")


def ratios(found: Mapping[str, Any]) -> dict[str, float]:
    """Of one case: speed over TRL's, step over the sum of the parts, memory over TRL's; where it streams, that too."""
    floor_s = sum(found["floor"][part] for part in _PARTS)
    ours, trl = found["gkd"], found["trl"]
    numbers = {
        "vs_trl": trl["step_s"] / ours["step_s"],
        "floor_ratio": ours["step_s"] / floor_s,
        "largest_process_over_trl": ours["memory"]["largest"] / trl["memory"]["largest"],
    }
    if "gkd_streaming" in found:
        streaming_s = found["gkd_streaming"]["step_s"]
        numbers |= {"vs_trl_streaming": trl["step_s"] / streaming_s, "floor_ratio_streaming": streaming_s / floor_s}
    return numbers


def table(found: Mapping[str, Any]) -> list[str]:
    """Seconds, ratios and memory: a row for each case."""
    columns = ("case", "TRL (s): median, fastest to slowest", "gkd (s)", "staleness 1 (s)")
    columns += ("rollout + teacher + train + optimizer alone (s)", "products of these (GFLOP)", "they alone (s)")
    columns += (
        "over TRL's speed",
        "over the parts",
        "largest process (GB)",
        "TRL's (GB)",
        "all processes: idle + over idle (GB)",
        "TRL's",
        "start-up (s)",
        "TRL's",
    )
    return markdown(columns, [_row(case) for case in found["cases"]])


def _row(case: Mapping[str, Any]) -> list[str]:
    ours, trl = case["gkd"], case["trl"]
    return [
        case["case"],
        _steps(trl),
        _steps(ours),
        _steps(case["gkd_streaming"]) if "gkd_streaming" in case else "-",
        " + ".join(f"{case['floor'][part]:.3f}" for part in _PARTS),
        f"{case['floor']['products_flop'] / 1e9:.0f}",
        f"{case['floor']['products_flop'] / case['floor']['products_per_s']:.3f}",
        f"{case['ratios']['vs_trl']:.2f}",
        f"{case['ratios']['floor_ratio']:.2f}",
        *(f"{system['memory']['largest'] / 1e9:.2f}" for system in (ours, trl)),
        *(_together(system["memory"]) for system in (ours, trl)),
        *(f"{system['start_s']:.0f}" for system in (ours, trl)),
    ]


def _together(memory: Mapping[str, Any]) -> str:
    """PSS of all processes: with everything loaded, and what came to it."""
    return f"{memory['idle'] / 1e9:.2f} + {(memory['peak'] - memory['idle']) / 1e9:.2f}"


def _steps(system: Mapping[str, Any]) -> str:
    """The median, and the shortest and the longest of the counted steps."""
    return f"{system['step_s']:.3f}, {min(system['step_seconds']):.3f} to {max(system['step_seconds']):.3f}"


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Of every case: a step of each system over TRL's, the parts alone in one bar; and the largest process."""
    cases = found["cases"]
    systems = {"trl": "TRL", "gkd": "gkd", "gkd_streaming": "gkd, staleness 1"}
    parts = {"rollout_s": "rollout", "teacher_s": "teacher", "train_s": "train", "optimizer_s": "optimizer"}
    with panels(path, 2, width=7.5) as (left, right):
        for number, (system, label) in enumerate(systems.items()):
            shown = [(place, case) for place, case in enumerate(cases) if system in case]
            places = [place + 0.2 * (number - 1.5) for place, _ in shown]
            left.bar(places, [case[system]["step_s"] / case["trl"]["step_s"] for _, case in shown], 0.2, label=label)
            largest = [case[system]["memory"]["largest"] / 1e9 for _, case in shown]
            right.bar([place + 0.25 * (number - 1) for place, _ in shown], largest, 0.25, label=label)
        ends = [0.0] * len(cases)
        for number, (part, label) in enumerate(parts.items()):
            sizes = [case["floor"][part] / case["trl"]["step_s"] for case in cases]
            places = [place + 0.3 for place in range(len(cases))]
            left.bar(places, sizes, 0.2, bottom=ends, color=f"C{number + 4}", label=f"{label} alone")
            ends = [end + size for end, size in zip(ends, sizes, strict=True)]
        left.set_ylabel("seconds of a step, over TRL's")
        right.set_ylabel("largest process, GB")
        for panel in (left, right):
            panel.set_xticks(range(len(cases)), [case["case"].replace("_", "\n") for case in cases], fontsize="small")
            panel.legend(fontsize="small", ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))
