"""From the rewards of a whole optimizer batch to each sample's advantage.

Computed before the batch is split, so that ranks and micro-batches change nothing.
"""

from collections import defaultdict
from collections.abc import Sequence
from statistics import stdev

from gkd.config.objective import Baseline
from gkd.types import Rollout


def advantages(
    rollouts: Sequence[Rollout], rewards: Sequence[float], *, baseline: Baseline, normalize_std: bool
) -> list[float]:
    """Reward minus baseline of every sample that the student wrote, 0 for the dataset's.

    A baseline is the mean reward of the *other* samples of the batch or prompt (leave-one-out: REINFORCE with the
    baseline of arXiv 2402.14740): it does not depend on the sample itself, so the expected gradient is exactly that
    without a baseline, where the plain mean of n samples would shrink it by (n - 1) / n. A sample that has no other to
    be compared with gets 0, and teaches nothing.

    Args:
        rollouts: the whole batch.
        rewards: of each.
        baseline: over what the mean is taken; `none` gives the rewards themselves.
        normalize_std: divide by the standard deviation (n - 1) of the same group's rewards, as GRPO does (arXiv
            2402.03300). Where all are equal the advantages are 0.

    Returns:
        One advantage per rollout, in units of the reward, or of its standard deviation.
    """
    groups: dict[tuple[int, int] | None, list[int]] = defaultdict(list)
    for i, rollout in enumerate(rollouts):
        if rollout.source == "student":
            by_prompt = (rollout.id.epoch, rollout.id.prompt_index)
            groups[by_prompt if baseline == "prompt_mean" else None].append(i)
    found = [0.0] * len(rollouts)
    for members in groups.values():
        own = [rewards[i] for i in members]
        if baseline == "none":
            values = own
        elif min(own) == max(own):  # also where there is one alone; what rounding leaves of 0 must not be divided
            values = [0.0] * len(own)
        else:
            values = [reward - (sum(own) - reward) / (len(own) - 1) for reward in own]
            values = [value / stdev(own) for value in values] if normalize_std else values
        for i, value in zip(members, values, strict=True):
            found[i] = value
    return found
