"""Which samples a teacher scores in one batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gkd.packing import split_by_tokens


@dataclass(frozen=True, slots=True)
class GroupLimits:
    """How much a teacher scores at once."""

    tokens: int
    """Most positions, padding included."""
    sequences: int
    """Most sequences."""


def scoring_groups(
    teachers: Sequence[str | None], lengths: Sequence[int], limits: Mapping[str | None, GroupLimits]
) -> list[list[int]]:
    """Split samples into groups, each for one teacher and within its limits.

    Args:
        teachers: of each sample, the teacher that scores it; None where there is no choice.
        lengths: of each sample, how many tokens the teacher reads.
        limits: of each teacher; the groups come in this order.

    Returns:
        Groups of indices into `lengths`; together they hold each index once.
    """
    groups: list[list[int]] = []
    for teacher, limit in limits.items():
        own = [i for i, name in enumerate(teachers) if name == teacher]
        split = split_by_tokens([lengths[i] for i in own], limit.tokens, max_sequences=limit.sequences)
        groups += [[own[i] for i in group] for group in split]
    return groups
