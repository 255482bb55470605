"""Plain text for continued pretraining: documents joined end to end and cut into blocks."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import itemgetter

from gkd.types import Completion
from rollout.tokenized import TokenizedRecord

SHORTEST = 2
"""Tokens of the shortest block: one to read and one to predict."""


def text_blocks(documents: Iterable[tuple[int, Sequence[int]]], *, block_tokens: int) -> tuple[TokenizedRecord, ...]:
    """Cut documents into blocks, each of which is one sample: its first token is read, every one after it is a target.

    The documents of a source are one stream, in their order, and each token of it is in one block; a block may hold
    several documents, the later of which can see the earlier ones. A source's last block is as long as what is left;
    one token alone has nothing to predict, and is left out.

    Args:
        documents: number of the source and tokens of each, its end token included; those of a source side by side.
        block_tokens: tokens of a block, at least `SHORTEST`.
    """
    blocks: list[TokenizedRecord] = []
    for source, members in groupby(documents, key=itemgetter(0)):
        left: list[int] = []
        for _, ids in members:
            left += ids
            whole = len(left) - len(left) % block_tokens
            blocks += _blocks(left[:whole], block_tokens, source, first_index=len(blocks))
            del left[:whole]
        if len(left) >= SHORTEST:
            blocks += _blocks(left, block_tokens, source, first_index=len(blocks))
    return tuple(blocks)


def _blocks(stream: Sequence[int], block_tokens: int, source: int, *, first_index: int) -> list[TokenizedRecord]:
    found = []
    for number, first in enumerate(range(0, len(stream), block_tokens)):
        ids = tuple(stream[first : first + block_tokens])
        completion = Completion(prompt_ids=ids[:1], response_ids=ids[1:])
        found.append(TokenizedRecord(first_index + number, ids[:1], completion, source))
    return found
