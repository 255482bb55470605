"""The one place that counts and averages: per-token losses become one number here and nowhere else.

Every response token gets a weight before any forward pass, from the lengths of the *whole* optimizer batch. A loss is
then the weighted sum over whatever tokens a rank or micro-batch holds, and the sums add up to the same number however
the batch was split. Legend: N sequences, T packed response tokens.
"""

from collections.abc import Sequence

import torch

from gkd.config.objective import Reduction


def sequence_token_weights(lengths: Sequence[int], reduction: Reduction) -> list[float]:
    """The weight of one token of each sequence, so that all tokens' weights add up to 1.

    Args:
        lengths: valid response tokens of each of the N sequences of the whole optimizer batch, over all ranks.
        reduction: which mean.

    Returns:
        N weights. Sequences without a valid token weigh 0; if there is no valid token at all, so does everything.
    """
    if reduction == "token_mean":
        total = sum(lengths)
        return [1.0 / total if length else 0.0 for length in lengths]
    num_sequences = sum(length > 0 for length in lengths)
    return [1.0 / (num_sequences * length) if length else 0.0 for length in lengths]


def weighted_sum(values_T: torch.Tensor, weights_T: torch.Tensor, mask_T: torch.Tensor) -> torch.Tensor:
    """Sum of `values * weights` over the valid tokens, in float32, as a scalar with a graph.

    Masked positions contribute exactly 0, also where their value is infinite or NaN, and so do their gradients. An
    empty mask gives 0 that still depends on `values_T`, so that every rank can call backward.
    """
    kept = torch.where(mask_T, values_T.float(), torch.zeros_like(values_T, dtype=torch.float32))
    return (kept * weights_T.float()).sum()
