"""Logits that are made when they are needed, a few tokens at a time.

`[tokens, vocabulary]` tensors of a whole batch are what distillation runs out of memory on (152,064 rows: 0.6 MB a
token and tensor, of which a loss holds many). Here a loss is computed chunk by chunk, and its backward pass computes
each chunk again, unless `gkd.one_pass` could make the gradient with it. Legend: T tokens, t tokens of a chunk, V rows,
H hidden width.
"""

import math
from collections.abc import Callable, Sequence
from functools import reduce
from itertools import accumulate
from typing import Protocol, cast

import torch
from torch.utils.checkpoint import checkpoint

from gkd.head import Head

CHUNK_TOKENS = {"cpu": 256, "cuda": 1024}
"""Tokens at a time, at most. On CPUs the heads' products want many (at V = 32,000 a loss of 128 at a time takes a
seventh longer), and cache and allocator few: of 512 a user's own divergence, under autograd, takes a third longer."""
CHUNK_ELEMENTS = {"cpu": 2**25, "cuda": 2**27}
"""Size [t, V] of a chunk, at most, as it is what memory has to hold several times over: 128 MiB of float32 on CPUs,
where half of it makes products so small that reading the head bounds them (at V = 152,000 a loss takes a sixth longer),
and 512 MiB on GPUs, which need more at once to be busy."""
_DIRECT = 2**22
"""Logits [T, V] of at most so many elements are made at once, and kept for the backward pass."""


class Logits(Protocol):
    """[T, V] logits at temperature 1."""

    @property
    def num_tokens(self) -> int:
        """T."""
        ...

    @property
    def num_rows(self) -> int:
        """V."""
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
        self.num_tokens, self.num_rows = logits_TV.shape
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
        self.num_rows = num_rows
        self.head = head

    def rows(self, span: slice) -> torch.Tensor:
        """[t, V] logits of some tokens."""
        return self.head(self.hidden_TH[span])[:, : self.num_rows]


class MixtureLogits:
    """A mixture of several models' distributions, p = sum_i w_i p_i in probability space, as log-probabilities.

    What divides by a temperature divides log p: the mixture is one teacher, and not a mixture of tempered ones.
    """

    def __init__(self, parts: Sequence[Logits], weights: Sequence[float]) -> None:
        """Logits of the same tokens and rows; their weights are positive, and 1 in sum."""
        self._parts = list(parts)
        self._log_weights = [math.log(weight) for weight in weights]
        self.num_tokens, self.num_rows = parts[0].num_tokens, parts[0].num_rows
        self.device = parts[0].device

    def rows(self, span: slice) -> torch.Tensor:
        """[t, V] log-probabilities of some tokens, in float32: bfloat16 could not hold their sums."""
        pairs = zip(self._parts, self._log_weights, strict=True)
        # One after the other: several teachers need no more memory than two.
        return reduce(torch.logaddexp, (raised(part.rows(span)).log_softmax(-1) + weight for part, weight in pairs))


class JoinedLogits:
    """The logits of several sequences, end to end."""

    def __init__(self, parts: Sequence[Logits]) -> None:
        """At least one part."""
        self._parts = list(parts)
        self._ends = list(accumulate(part.num_tokens for part in parts))
        self.num_tokens, self.num_rows = self._ends[-1], self._parts[0].num_rows
        self.device = self._parts[0].device

    def rows(self, span: slice) -> torch.Tensor:
        """[t, V] logits of some tokens."""
        return self._joined(span, lambda part, own: part.rows(own))

    def hidden(self, span: slice) -> torch.Tensor | None:
        """[t, H] hidden states of some tokens; None unless every part is made of them, all of one width."""
        widths = {part.hidden_TH.shape[-1] if isinstance(part, HeadLogits) else None for part in self._parts}
        if None in widths or len(widths) > 1:
            return None
        return self._joined(span, lambda part, own: cast(HeadLogits, part).hidden_TH[own])

    def _joined(self, span: slice, rows_of: Callable[[Logits, slice], torch.Tensor]) -> torch.Tensor:
        start, stop, _ = span.indices(self.num_tokens)
        found = []
        for part, end in zip(self._parts, self._ends, strict=True):
            first = end - part.num_tokens
            if first < stop and start < end:
                found.append(rows_of(part, slice(max(start - first, 0), stop - first)))
        return torch.cat(found) if found else rows_of(self._parts[0], slice(0, 0))


class FrozenLogits:
    """The same logits without a graph."""

    def __init__(self, logits: Logits) -> None:
        self._logits = logits
        self.num_tokens, self.num_rows = logits.num_tokens, logits.num_rows
        self.device = logits.device

    @torch.no_grad()
    def rows(self, span: slice) -> torch.Tensor:
        """[t, V] logits of some tokens."""
        return self._logits.rows(span)


def raised(tensor: torch.Tensor) -> torch.Tensor:
    """Raised to float32; float64 stays, so that tests can compare exactly."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def tempered(logits_tV: torch.Tensor, temperature: float) -> torch.Tensor:
    """Divided by a loss temperature; at 1 no second tensor is made."""
    return logits_tV if temperature == 1.0 else logits_tV / temperature


def hidden_of(logits: Logits, span: slice) -> torch.Tensor | None:
    """[t, H] last hidden states that some tokens' logits are made of; None where logits came whole."""
    match logits:
        case HeadLogits():
            return logits.hidden_TH[span]
        case JoinedLogits():
            return logits.hidden(span)
        case _:
            return None


def chunk_tokens(num_rows: int, device_type: str) -> int:
    """Tokens of a chunk: as many as both bounds allow, and at least one."""
    return max(1, min(CHUNK_TOKENS[device_type], CHUNK_ELEMENTS[device_type] // max(1, num_rows)))


def tokens_at_once(num_tokens: int, num_rows: int, device_type: str) -> int:
    """How many of T tokens have logits [t, V] at the same time."""
    return num_tokens if num_tokens * num_rows <= _DIRECT else min(num_tokens, chunk_tokens(num_rows, device_type))


def chunk_spans(num_tokens: int, num_rows: int, device_type: str) -> list[slice]:
    """The chunks of T tokens, at least one."""
    size = max(1, tokens_at_once(num_tokens, num_rows, device_type))
    return [slice(first, min(first + size, num_tokens)) for first in range(0, max(1, num_tokens), size)]


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
    spans = chunk_spans(num_tokens, num_rows, device.type)
    if len(spans) == 1:
        return function(spans[0])
    parts = [checkpoint(function, span, use_reentrant=False, preserve_rng_state=False) for span in spans]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))
