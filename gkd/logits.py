"""Logits that are made when they are needed, a few tokens at a time.

`[tokens, vocabulary]` tensors of a whole batch are what distillation runs out of memory on (152,064 rows: 0.6 MB a
token and tensor, of which a loss holds many). Here a loss is computed chunk by chunk, and its backward pass computes
each chunk again. Legend: T tokens, t tokens of a chunk, V rows, H hidden width.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Protocol

import torch
from torch.utils.checkpoint import checkpoint

from gkd.head import Head

CHUNK_TOKENS = {"cpu": 128, "cuda": 1024}
"""Tokens at a time. On CPUs the gain is cache: 128 rows of 32,000 take less than half the time of 512."""
_DIRECT = 2**22
"""Logits [T, V] of at most so many elements are made at once, and kept for the backward pass."""


class Logits(Protocol):
    """[T, V] logits at temperature 1."""

    @property
    def num_tokens(self) -> int:
        """T."""
        ...

    @property
    def device(self) -> torch.device:
        """Where they are made."""
        ...

    def rows(self, span: slice) -> torch.Tensor:
        """[t, V] logits of some tokens, in the model's dtype, with a graph if the model has one."""
        ...


class WholeLogits:
    """Logits that are there."""

    def __init__(self, logits_TV: torch.Tensor) -> None:
        self._logits_TV = logits_TV
        self.num_tokens = len(logits_TV)
        self.device = logits_TV.device

    def rows(self, span: slice) -> torch.Tensor:
        """[t, V] logits of some tokens."""
        return self._logits_TV[span]


class HeadLogits:
    """Hidden states, and the head that turns them into logits."""

    def __init__(self, hidden_TH: torch.Tensor, head: Head, *, num_rows: int) -> None:
        """`num_rows` is how many of the head's rows are wanted."""
        self.hidden_TH = hidden_TH
        self.num_tokens = len(hidden_TH)
        self.device = hidden_TH.device
        self._head = head
        self._num_rows = num_rows

    def rows(self, span: slice) -> torch.Tensor:
        """[t, V] logits of some tokens."""
        return self._head(self.hidden_TH[span])[:, : self._num_rows]


class JoinedLogits:
    """The logits of several sequences, end to end."""

    def __init__(self, parts: Sequence[Logits]) -> None:
        """At least one part."""
        self._parts = list(parts)
        self._ends = list(accumulate(part.num_tokens for part in parts))
        self.num_tokens = self._ends[-1]
        self.device = self._parts[0].device

    def rows(self, span: slice) -> torch.Tensor:
        """[t, V] logits of some tokens."""
        start, stop, _ = span.indices(self.num_tokens)
        found = []
        for part, end in zip(self._parts, self._ends, strict=True):
            first = end - part.num_tokens
            if first < stop and start < end:
                found.append(part.rows(slice(max(start - first, 0), stop - first)))
        return torch.cat(found) if found else self._parts[0].rows(slice(0, 0))


def tokens_at_once(num_tokens: int, num_rows: int, device_type: str) -> int:
    """How many of T tokens have logits [t, V] at the same time."""
    return num_tokens if num_tokens * num_rows <= _DIRECT else min(num_tokens, CHUNK_TOKENS[device_type])


def map_chunks(
    function: Callable[[slice], tuple[torch.Tensor, ...]], *, num_tokens: int, num_rows: int, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """Apply a function to all tokens, a few at a time, and join what it returns.

    The function must give the same when it is called again: the backward pass does so, instead of keeping what a chunk
    computed. What is random in it is drawn before.

    Args:
        function: from the span of a chunk to tensors [t, ...].
        num_tokens: T.
        num_rows: V, of the largest tensors [t, V] that the function makes.
        device: where it runs.

    Returns:
        For each tensor of the function, [T, ...].
    """
    size = tokens_at_once(num_tokens, num_rows, device.type)
    if size == num_tokens:
        return function(slice(0, num_tokens))
    spans = [slice(first, min(first + size, num_tokens)) for first in range(0, num_tokens, size)]
    parts = [checkpoint(function, span, use_reentrant=False, preserve_rng_state=False) for span in spans]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))
