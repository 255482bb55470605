"""The order in which training records are used.

Everything here is a pure function of the seed and a number: there is no cursor to lose, and a resumed run asks for the
next number.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from gkd.seeds import generator
from gkd.types import Prompt, SampleId
from rollout.tokenized import TokenizedRecord

_BLOCK = 4096
"""Draws of a source that are made at once."""


class PromptStream:
    """The prompts of any optimizer step.

    Sample number n of the run (from 0) is prompt n // samples_per_prompt of the stream. Without weights the stream goes
    through the data in an order shuffled anew for each epoch. With weights each prompt's source is drawn first, and
    each source has epochs of its own.
    """

    def __init__(
        self,
        records: Sequence[TokenizedRecord],
        *,
        seed: int,
        samples_per_prompt: int,
        weights: Sequence[float] | None = None,
        first_epoch: int = 0,
    ) -> None:
        """Set up.

        Args:
            records: the records of all sources.
            seed: the run's.
            samples_per_prompt: how often a prompt is answered in a row.
            weights: share of the prompts that come from each source, relative to the others; every source has a
                record. None: all records alike.
            first_epoch: where epochs are counted from, so that samples of a later stage are not those of an earlier.
        """
        self._samples_per_prompt = samples_per_prompt
        self._first_epoch = first_epoch
        self._order: _Shuffled | _Weighted
        if weights is None:
            self._order = _Shuffled(records, seed)
        else:
            sources = [[record for record in records if record.source == source] for source in range(len(weights))]
            self._order = _Weighted([_Shuffled(own, seed, i) for i, own in enumerate(sources)], weights, seed)

    def sample(self, number: int) -> Prompt:
        """The prompt of the run's sample `number`, counted from 0."""
        prompt_number, sample_index = divmod(number, self._samples_per_prompt)
        epoch, record = self._order.at(prompt_number)
        return Prompt(
            id=SampleId(self._first_epoch + epoch, record.index, sample_index),
            token_ids=record.prompt_ids,
            completion=record.completion,
            teacher=record.teacher,
            teacher_prompt_ids=record.teacher_prompt_ids,
        )

    def epoch_after(self, num_samples: int) -> int:
        """The first epoch of which none of the first `num_samples` samples is."""
        return self._first_epoch + self._order.epochs(-(-num_samples // self._samples_per_prompt))


class _Shuffled:
    """Records over and over, in an order of its own for each epoch."""

    def __init__(self, records: Sequence[TokenizedRecord], seed: int, *key: int) -> None:
        """`key` tells the orders of several such streams apart."""
        assert records, "a source without a record is refused before training"
        self._records = records
        self._seed = seed
        self._key = key
        self._order = lru_cache(maxsize=2)(self._shuffle)  # a step can straddle two epochs

    def _shuffle(self, epoch: int) -> np.ndarray:
        return generator(self._seed, "prompt-order", epoch, *self._key).permutation(len(self._records))

    def at(self, number: int) -> tuple[int, TokenizedRecord]:
        """Prompt `number` with its epoch."""
        epoch, place = divmod(number, len(self._records))
        return epoch, self._records[self._order(epoch)[place]]

    def epochs(self, num_prompts: int) -> int:
        """How many epochs the first so many prompts are of."""
        return -(-num_prompts // len(self._records))


class _Weighted:
    """Several streams, of which each prompt's is drawn by weight.

    The k-th draw of a stream gives its k-th prompt. k is counted from the first prompt of the run on, in blocks, whose
    sums are kept: a resumed run draws the earlier blocks again.
    """

    def __init__(self, streams: Sequence[_Shuffled], weights: Sequence[float], seed: int) -> None:
        self._streams = streams
        self._shares = np.array(weights) / sum(weights)
        self._seed = seed
        self._before = [np.zeros(len(streams), dtype=np.int64)]  # draws of each stream before block b
        self._draws = lru_cache(maxsize=2)(self._draw)

    def _draw(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The stream of each prompt of a block, and how many earlier ones of the block are of the same stream."""
        drawn = generator(self._seed, "source", block).choice(len(self._streams), size=_BLOCK, p=self._shares)
        earlier = np.empty(_BLOCK, dtype=np.int64)
        for stream in range(len(self._streams)):
            places = np.flatnonzero(drawn == stream)
            earlier[places] = np.arange(len(places))
        return drawn, earlier

    def at(self, number: int) -> tuple[int, TokenizedRecord]:
        """Prompt `number` with its epoch in its own stream."""
        block, place = divmod(number, _BLOCK)
        before = self._drawn_before(block)
        drawn, earlier = self._draws(block)
        stream = int(drawn[place])
        return self._streams[stream].at(int(before[stream] + earlier[place]))

    def epochs(self, num_prompts: int) -> int:
        """How many epochs the first so many prompts are of, in the stream that has most."""
        block, place = divmod(num_prompts, _BLOCK)
        drawn, _ = self._draws(block)
        counts = self._drawn_before(block) + np.bincount(drawn[:place], minlength=len(self._streams))
        return max(stream.epochs(int(count)) for stream, count in zip(self._streams, counts, strict=True))

    def _drawn_before(self, block: int) -> np.ndarray:
        """Draws of each stream in the blocks before this one."""
        while len(self._before) <= block:
            drawn, _ = self._draws(len(self._before) - 1)
            self._before.append(self._before[-1] + np.bincount(drawn, minlength=len(self._streams)))
        return self._before[block]
