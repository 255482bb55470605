"""The few numbers that the parts of `make bench` come to."""

from collections.abc import Mapping
from typing import Any

_VS_TRL = {
    "vs_trl_fixed_32k": "fixed_32k_b32",
    "vs_trl_fixed_2k": "fixed_2k_b64",
    "vs_trl_natural": "natural_32k_b32",
}
"""Name -> case of `benchmarks.speed`: sequences per second over those of TRL's `GKDTrainer`."""
_MEMORY_CASE = "fixed_32k_b32"
_SYNC_STUDENT = "54M"


def headlines(found: Mapping[str, Any]) -> dict[str, float]:
    """Of the parts that were measured: speed over TRL's, step over the sum of its parts, memory, sync over applying."""
    numbers: dict[str, float] = {}
    cases = {case["case"]: case for case in found.get("speed", {}).get("cases", ())}
    numbers |= {name: cases[case]["ratios"]["vs_trl"] for name, case in _VS_TRL.items() if case in cases}
    numbers |= {f"floor_ratio_{name}": case["ratios"]["floor_ratio"] for name, case in cases.items()}
    if _MEMORY_CASE in cases:
        numbers["largest_process_over_trl"] = cases[_MEMORY_CASE]["ratios"]["largest_process_over_trl"]
    syncs = {row["student"]: row for row in found.get("sync", {}).get("students", ())}
    if _SYNC_STUDENT in syncs:
        numbers["sync_over_apply"] = syncs[_SYNC_STUDENT]["sync_over_apply"]
    return numbers
