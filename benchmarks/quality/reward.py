"""The reward of the runs that have one."""

from collections.abc import Sequence

from gkd.rewards import RewardSample


def right(samples: Sequence[RewardSample]) -> list[float]:
    """1 for a right answer, else 0."""
    return [float(sample.response == _worked_out(sample.prompt)) for sample in samples]


def _worked_out(prompt: str) -> str:
    total, totals = int(prompt[0]), []
    for sign, digit in zip(prompt[1:-1:2], prompt[2:-1:2], strict=True):
        total += int(digit) if sign == "+" else -int(digit)
        totals.append(f"{total:02d}")
    return ";".join(totals)
