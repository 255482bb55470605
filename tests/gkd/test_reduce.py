from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gkd.reduce import metric_means, metric_sums, sequence_token_weights, weighted_sum


def test_token_mean_is_the_mean_over_all_tokens():
    lengths = [3, 1, 4]
    losses = torch.arange(8.0)
    weights = torch.repeat_interleave(
        torch.tensor(sequence_token_weights(lengths, "token_mean")), torch.tensor(lengths)
    )
    total = weighted_sum(losses, weights, torch.ones(8, dtype=torch.bool))
    assert total.item() == pytest.approx(losses.mean().item())


def test_sequence_mean_averages_each_sequence_first():
    lengths = [3, 0, 1]
    losses = torch.tensor([1.0, 2.0, 3.0, 10.0])
    weights = torch.repeat_interleave(
        torch.tensor(sequence_token_weights(lengths, "sequence_mean")), torch.tensor(lengths)
    )
    total = weighted_sum(losses, weights, torch.ones(4, dtype=torch.bool))
    assert total.item() == pytest.approx((2.0 + 10.0) / 2)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=20), st.sampled_from(["token_mean", "sequence_mean"]))
def test_weights_add_up_to_one_whatever_the_lengths(lengths, reduction):
    weights = sequence_token_weights(lengths, reduction)
    total = sum(weight * length for weight, length in zip(weights, lengths, strict=True))
    assert total == pytest.approx(1.0 if any(lengths) else 0.0)


@given(st.lists(st.integers(1, 9), min_size=2, max_size=12), st.integers(1, 11))
def test_splitting_a_batch_leaves_the_loss_unchanged(lengths, cut):
    weights = sequence_token_weights(lengths, "sequence_mean")
    values = [torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in lengths]

    def share(sequences):
        masks = [torch.ones(lengths[i], dtype=torch.bool) for i in sequences]
        parts = [
            weighted_sum(values[i], torch.full((lengths[i],), weights[i]), mask)
            for i, mask in zip(sequences, masks, strict=True)
        ]
        return sum(part.item() for part in parts)

    everything = list(range(len(lengths)))
    assert share(everything[:cut]) + share(everything[cut:]) == pytest.approx(share(everything), abs=1e-6)


def test_an_empty_mask_gives_zero_with_a_graph():
    values = torch.tensor([1.0, float("nan"), float("inf")], requires_grad=True)
    total = weighted_sum(values * 2, torch.zeros(3), torch.zeros(3, dtype=torch.bool))
    total.backward()
    assert total.item() == 0
    assert values.grad.tolist() == [0, 0, 0]


def test_masked_positions_contribute_exactly_nothing():
    values = torch.tensor([1.0, float("nan"), 3.0], requires_grad=True)
    total = weighted_sum(values, torch.full((3,), 0.5), torch.tensor([True, False, True]))
    total.backward()
    assert total.item() == 2.0
    assert values.grad.tolist() == [0.5, 0, 0.5]


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_metrics_are_means_over_the_tokens_that_the_objective_counts(reduction):
    """Over several micro-batches, of which one has none; the batch's other tokens have no part in them."""
    lengths, values = (2, 3, 1), torch.tensor([1.0, 3.0, 5.0, 7.0, float("nan"), 9.0])
    mask = torch.tensor([True, True, True, True, False, False])
    weights = torch.tensor(sequence_token_weights(lengths, reduction)).repeat_interleave(torch.tensor(lengths))
    totals = Counter()
    for span in (slice(0, 2), slice(2, 5), slice(5, 6)):
        none = torch.zeros_like(mask[span])
        totals.update(metric_sums({"a": values[span]}, {"b": (values[span], none)}, weights[span], mask[span]))
    mean = {"token_mean": 4.0, "sequence_mean": (2 / 2 * 2.0 + 2 / 3 * 6.0) / (1 + 2 / 3)}[reduction]
    assert metric_means(totals) == {"a": pytest.approx(mean)}
