"""What the measurements come to."""

from collections.abc import Mapping
from typing import Any

from benchmarks.record import markdown

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
    columns = ("case", "TRL (s)", "gkd (s)", "staleness 1 (s)", "rollout + teacher + train + optimizer alone (s)")
    columns += (
        "over TRL's speed",
        "over the parts",
        "largest process (GB)",
        "TRL's (GB)",
        "all over idle (GB)",
        "TRL's",
    )
    return markdown(columns, [_row(case) for case in found["cases"]])


def _row(case: Mapping[str, Any]) -> list[str]:
    ours, trl = case["gkd"], case["trl"]
    return [
        case["case"],
        f"{trl['step_s']:.3f}",
        f"{ours['step_s']:.3f}",
        f"{case['gkd_streaming']['step_s']:.3f}" if "gkd_streaming" in case else "-",
        " + ".join(f"{case['floor'][part]:.3f}" for part in _PARTS),
        f"{case['ratios']['vs_trl']:.2f}",
        f"{case['ratios']['floor_ratio']:.2f}",
        *(f"{system['memory']['largest'] / 1e9:.2f}" for system in (ours, trl)),
        *(f"{(system['memory']['peak'] - system['memory']['idle']) / 1e9:.2f}" for system in (ours, trl)),
    ]
