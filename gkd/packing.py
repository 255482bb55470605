"""How ragged sequences become rectangular rows without leaking into each other.

Legend: N sequences, R rows, S positions of a row, T response tokens of all N sequences, end to end in their order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRows:
    """N sequences laid out in R rows, and where their responses are predicted."""

    input_ids_RS: torch.Tensor
    """[R, S] int64; rows end in padding."""
    position_ids_RS: torch.Tensor | None
    """[R, S] int64, from 0 for each sequence of a row; None if every row holds one sequence. Padding goes on counting:
    it comes after every real token of its row, so causal attention never lets it be seen."""
    response_index_T: torch.Tensor
    """[T] int64 into the flattened rows: the position *before* each response token, whose output predicts it."""
    response_ids_T: torch.Tensor
    """[T] int64, the response tokens."""
    response_lengths: tuple[int, ...]
    """Response tokens of each of the N sequences; their sum is T."""


def pack(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], *, share_rows: bool) -> PackedRows:
    """Lay out N sequences in rows as long as the longest of them.

    Args:
        prompts: N prompts, each with at least one token (the first response token is predicted from the last of them).
        responses: N responses, any of them possibly empty.
        share_rows: put several short sequences into one row, told apart by position ids. Only for models that
            `ResponseForward.packing_gap` finds to keep them apart.

    Raises:
        ValueError: if there is no sequence, or a prompt is empty.
    """
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("packing needs at least one sequence, and every prompt needs at least one token")
    sequences = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    capacity = max(map(len, sequences))
    rows = _fill_rows([len(s) for s in sequences], capacity) if share_rows else [[i] for i in range(len(sequences))]

    input_ids = torch.zeros(len(rows), capacity, dtype=torch.long)
    position_ids = torch.zeros(len(rows), capacity, dtype=torch.long)
    first_position = [0] * len(sequences)
    for row_number, row in enumerate(rows):
        column = 0
        for i in row:
            end = column + len(sequences[i])
            input_ids[row_number, column:end] = torch.tensor(sequences[i])
            position_ids[row_number, column:] = torch.arange(capacity - column)
            first_position[i] = row_number * capacity + column
            column = end
    index = [
        torch.arange(len(response)) + first + len(prompt) - 1
        for first, prompt, response in zip(first_position, prompts, responses, strict=True)
    ]
    return PackedRows(
        input_ids_RS=input_ids,
        position_ids_RS=position_ids if any(len(row) > 1 for row in rows) else None,
        response_index_T=torch.cat(index),
        response_ids_T=torch.tensor([token for response in responses for token in response], dtype=torch.long),
        response_lengths=tuple(len(response) for response in responses),
    )


def _fill_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit decreasing: the longest sequence first, each into the first row with room. Ties keep their order."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row_number = next((r for r, free in enumerate(room) if free >= lengths[i]), None)
        if row_number is None:
            rows.append([])
            room.append(capacity)
            row_number = len(rows) - 1
        rows[row_number].append(i)
        room[row_number] -= lengths[i]
    return rows


def split_by_tokens(lengths: Sequence[int], budget: int, *, max_sequences: int | None = None) -> list[list[int]]:
    """Split sequences into groups of at most `budget` positions each, padding to the group's longest included.

    The longest come first, so that a group's lengths are alike and an over-large budget shows at once. The split
    depends on the lengths alone. A sequence longer than the budget gets a group of its own.

    Args:
        lengths: tokens of each sequence.
        budget: most positions in a group.
        max_sequences: most sequences in a group; None for no limit.

    Returns:
        Groups of indices into `lengths`; together they hold each index once.
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        group = groups[-1] if groups else None
        if (
            group is None
            or (len(group) + 1) * lengths[group[0]] > budget
            or (max_sequences is not None and len(group) >= max_sequences)
        ):
            groups.append([i])
        else:
            group.append(i)
    return groups
