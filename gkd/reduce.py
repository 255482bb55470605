"""The one place that counts and averages: per-token losses become one number here and nowhere else.

Every response token gets a weight before any forward pass, from the lengths of the *whole* optimizer batch. A loss is
then the weighted sum over whatever tokens a rank or micro-batch holds, and the sums add up to the same number however
the batch was split. Legend: N sequences, T packed response tokens.
"""

from collections.abc import Mapping, Sequence

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


def sequence_sum_scales(token_weights: Sequence[float], chosen: Sequence[bool]) -> list[float]:
    """What makes the reducer's weighted sum a mean over sequences, each the *sum* over its tokens.

    Policy gradients are of this form: a sequence is one sample, however long it is. A loss per token that is multiplied
    by its sequence's scale has the weight 1 / (number of chosen sequences), under every reduction.

    Args:
        token_weights: what `sequence_token_weights` gave, of the whole optimizer batch.
        chosen: which of the sequences are averaged.

    Returns:
        One scale per sequence; 0 for those that are not chosen, and those without a valid token.
    """
    num = sum(weight > 0 for weight, is_chosen in zip(token_weights, chosen, strict=True) if is_chosen)
    return [
        1.0 / (num * weight) if is_chosen and weight > 0 else 0.0
        for weight, is_chosen in zip(token_weights, chosen, strict=True)
    ]


def weighted_sum(values_T: torch.Tensor, weights_T: torch.Tensor, mask_T: torch.Tensor) -> torch.Tensor:
    """Sum of `values * weights` over the valid tokens, in float32, as a scalar with a graph.

    Masked positions contribute exactly 0, also where their value is infinite or NaN, and so do their gradients. An
    empty mask gives 0 that still depends on `values_T`, so that every rank can call backward.
    """
    kept = torch.where(mask_T, values_T.float(), torch.zeros_like(values_T, dtype=torch.float32))
    return (kept * weights_T.float()).sum()


_SHARE = "/share"
"""Ends the name of the weight that the tokens of a metric have; metrics have no slash in their names."""


def metric_sums(
    metrics_T: Mapping[str, torch.Tensor],
    partial_metrics_T: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    weights_T: torch.Tensor,
    mask_T: torch.Tensor,
) -> dict[str, float]:
    """What a micro-batch adds to an objective's metrics; add up over micro-batches and ranks, then `metric_means`.

    Args:
        metrics_T: of the tokens that the objective counts.
        partial_metrics_T: each with the tokens that it is of.
        weights_T: of the batch's tokens. Those that the objective counts need not add up to 1: it may count a part.
        mask_T: which it counts.
    """
    counted = {name: (values_T, mask_T) for name, values_T in metrics_T.items()}
    sums = {}
    for name, (values_T, own_T) in (counted | dict(partial_metrics_T)).items():
        sums[name] = weighted_sum(values_T, weights_T, own_T).item()
        sums[name + _SHARE] = weighted_sum(torch.ones_like(values_T), weights_T, own_T).item()
    return sums


def metric_means(sums: Mapping[str, float]) -> dict[str, float]:
    """Metrics from the sums over a whole batch; those of tokens that it has none of are left out."""
    shares = {name.removesuffix(_SHARE): share for name, share in sums.items() if name.endswith(_SHARE)}
    means = {name: value for name, value in sums.items() if not name.endswith(_SHARE) and shares.get(name, 1.0) > 0}
    return {name: value / shares.get(name, 1.0) for name, value in means.items()}
