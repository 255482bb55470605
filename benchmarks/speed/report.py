"""What the measurements come to."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

_PARTS = ("rollout_s", "teacher_s", "train_s", "optimizer_s")


def ratios(found: Mapping[str, Any]) -> dict[str, float]:
    """Of one case: speed over TRL's, step over the sum of the parts, memory over TRL's."""
    floor_s = sum(found["floor"][part] for part in _PARTS)
    ours, streaming, trl = found["gkd"], found["gkd_streaming"], found["trl"]
    return {
        "vs_trl": trl["step_s"] / ours["step_s"],
        "vs_trl_streaming": trl["step_s"] / streaming["step_s"],
        "floor_ratio": ours["step_s"] / floor_s,
        "floor_ratio_streaming": streaming["step_s"] / floor_s,
        "largest_process_over_trl": ours["memory"]["largest"] / trl["memory"]["largest"],
    }


def print_tables(found: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Seconds, ratios and memory of each case."""
    table = Table(
        "case", "TRL s", "gkd s", "streaming s", "parts s", "over TRL", "over parts", "largest GB", "TRL's GB"
    )
    for case in found:
        ours, trl = case["gkd"], case["trl"]
        table.add_row(
            case["case"],
            f"{trl['step_s']:.3f}",
            f"{ours['step_s']:.3f}",
            f"{case['gkd_streaming']['step_s']:.3f}",
            " + ".join(f"{case['floor'][part]:.3f}" for part in _PARTS),
            f"{case['ratios']['vs_trl']:.2f}",
            f"{case['ratios']['floor_ratio']:.2f}",
            f"{ours['memory']['largest'] / 1e9:.2f}",
            f"{trl['memory']['largest'] / 1e9:.2f}",
        )
    console.print(table)
