"""Learning-rate schedules, as pure functions of the step."""

import math
from typing import Literal


def learning_rate(
    step: int, *, peak: float, schedule: Literal["constant", "linear", "cosine"], warmup_steps: int, max_steps: int
) -> float:
    """The learning rate of optimizer step `step`, from 1: linear warm-up to `peak`, then decay towards 0 at the end.

    The last step still learns: decay would reach 0 one step after it.
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    progress = (step - 1 - warmup_steps) / (max_steps - warmup_steps)
    match schedule:
        case "constant":
            return peak
        case "linear":
            return peak * (1 - progress)
        case "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * progress))
