"""How an optimizer step is shared out: which rank trains on which samples, in which micro-batches.

Everything follows from the lengths of the whole batch, so it is the same in every run. Ranks wait for each other at
every forward and backward pass of ZeRO 2 and 3, so all of them make equally many, and their loads are alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from gkd.config.objective import Reduction
from gkd.packing import split_by_tokens
from gkd.reduce import sequence_sum_scales, sequence_token_weights
from gkd.types import Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class RankShare:
    """One rank's part of a step."""

    samples: tuple[int, ...]
    """Its samples, as indices into the step's batch."""
    weights: tuple[float, ...]
    """Per sample of the share, the weight of one of its loss tokens (`gkd.reduce`)."""
    sequence_scales: tuple[float, ...]
    """Per sample of the share, what makes sums over sequences of losses per token (`gkd.reduce`)."""
    micro_batches: tuple[tuple[int, ...], ...]
    """Its forward passes, as places in `samples`; equally many on every rank. An empty one has nothing to add, and is
    there because the other ranks wait for it."""


def share_out(
    rollouts: Sequence[Rollout], *, num_ranks: int, tokens_per_micro_batch: int, reduction: Reduction
) -> list[RankShare]:
    """A share for every rank.

    The longest sample goes first, each to the rank with the fewest tokens so far, so that loads differ by less than
    one sample. A rank that would make fewer forward passes than another cuts its largest ones in two.

    Args:
        rollouts: the whole batch.
        num_ranks: training processes.
        tokens_per_micro_batch: most positions in a forward pass, padding included; a longer sample passes alone.
        reduction: which mean over the batch's tokens.
    """
    lengths = [len(rollout.token_ids) for rollout in rollouts]
    weights = sequence_token_weights([rollout.num_loss_tokens for rollout in rollouts], reduction)
    scales = sequence_sum_scales(weights, [rollout.source == "student" for rollout in rollouts])
    owned = _assign(lengths, num_ranks)
    passes = [split_by_tokens([lengths[i] for i in samples], tokens_per_micro_batch) for samples in owned]
    most = max(map(len, passes))
    shortest = lengths.index(min(lengths))
    shares = []
    for samples, own_passes in zip(owned, passes, strict=True):
        held = samples or [shortest]  # a rank without work of its own stands by with the shortest sample
        shares.append(
            RankShare(
                samples=tuple(held),
                weights=tuple(weights[i] for i in held),
                sequence_scales=tuple(scales[i] for i in held),
                micro_batches=tuple(tuple(places) for places in _stretch(own_passes, most)),
            )
        )
    return shares


def _assign(lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Samples of each rank, in the batch's order."""
    owned: list[list[int]] = [[] for _ in range(num_ranks)]
    load = [0] * num_ranks
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = load.index(min(load))
        owned[rank].append(i)
        load[rank] += lengths[i]
    return [sorted(samples) for samples in owned]


def _stretch(passes: list[list[int]], number: int) -> list[list[int]]:
    """The same samples in `number` forward passes: the largest are halved, then empty ones added."""
    passes = list(passes)
    while len(passes) < number:
        largest = max(range(len(passes)), key=lambda i: len(passes[i]), default=None)
        if largest is None or len(passes[largest]) <= 1:
            return passes + [[] for _ in range(number - len(passes))]
        places = passes[largest]
        passes[largest : largest + 1] = [places[: len(places) // 2], places[len(places) // 2 :]]
    return passes
