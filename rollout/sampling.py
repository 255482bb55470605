"""Tokens drawn from weights, each row by a number of its own: the same token alone or in any batch, on any worker.

Where every sequence has a random generator of its own, vLLM fills a row of V exponential variates for each, one row
after the other: at V = 32,000 that takes longer than everything else of an engine step on a CPU. Here a sequence needs
one uniform number per token, which follows from its seed and the token's place, so there is no state to keep or rewind
either (chunked prefills, preemption). Legend: B sequences, V vocabulary, K blocks of W tokens.
"""

from collections.abc import Sequence

import numpy as np
import torch

_WIDTH = 64
"""Tokens of a block: most vocabularies are whole blocks."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seeds: Sequence[int], places: Sequence[int]) -> np.ndarray:
    """Uniform numbers of [0, 1), float64 [B]: number `place` of the stream that each seed begins (splitmix64).

    Args:
        seeds: 0 <= seed < 2**64.
        places: from 0 on.
    """
    with np.errstate(over="ignore"):  # wrapping around is what it does
        mixed = np.asarray(seeds, dtype=np.uint64) + _GOLDEN * (np.asarray(places, dtype=np.uint64) + np.uint64(1))
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw(weights_BV: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """One token of each row, with probabilities in proportion to its weights: [B] int64.

    By inversion of the distribution function: a block of tokens first, then a token of it, so that no running sum goes
    over all of V; in float32 it would lose what is small, and in float64 it would take most of the time. What has no
    weight is never drawn. Weights that are no numbers, a broken model's, give any token: the sync's proof says why.

    Args:
        weights_BV: float32, 0 or more, some of each row above 0.
        uniform_B: float64 in [0, 1).
    """
    padding = -weights_BV.shape[1] % _WIDTH
    padded_BV = torch.nn.functional.pad(weights_BV, (0, padding)) if padding else weights_BV
    weights_BKW = padded_BV.view(len(padded_BV), -1, _WIDTH)
    block_B, rest_B = _invert(weights_BKW.sum(-1), uniform_B)
    inner_B, _ = _invert(weights_BKW[torch.arange(len(block_B), device=block_B.device), block_B], rest_B)
    return (block_B * _WIDTH + inner_B).clamp_(max=weights_BV.shape[1] - 1)


def draw_nucleus(weights_BV: torch.Tensor, uniform_B: torch.Tensor, top_p_B: torch.Tensor) -> torch.Tensor:
    """`draw` from the fewest tokens of each row whose share of its weights reaches `top_p_B` (Holtzman et al. 2019)."""
    sorted_BV, ids_BV = weights_BV.sort(dim=-1, descending=True, stable=True)
    sums_BV = sorted_BV.double().cumsum(-1)
    is_beyond_BV = sums_BV - sorted_BV >= top_p_B[:, None] * sums_BV[:, -1:]
    place_B = draw(sorted_BV.masked_fill(is_beyond_BV, 0.0), uniform_B)
    return ids_BV.gather(1, place_B[:, None])[:, 0]


def _invert(weights_BN: torch.Tensor, uniform_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The place in which each uniform number falls when [0, 1) is cut by the weights, and how far into it: [0, 1)."""
    sums_BN = weights_BN.double().cumsum(-1)
    total_B1 = sums_BN[:, -1:]
    # Rounding may lift the product to the total, beyond which nothing is.
    target_B1 = torch.minimum(uniform_B[:, None] * total_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))
    place_B1 = torch.searchsorted(sums_BN, target_B1, right=True)
    place_B1 = place_B1.clamp(max=weights_BN.shape[-1] - 1)  # only for weights that are no numbers
    weight_B1 = weights_BN.gather(1, place_B1).double()
    into_B1 = (target_B1 - (sums_BN.gather(1, place_B1) - weight_B1)) / weight_B1
    return place_B1[:, 0], into_B1[:, 0].clamp(0.0, 1.0 - 2.0**-53)
