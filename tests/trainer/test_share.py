"""Sharing a step out over ranks: every sample once, equally many passes, loads alike."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gkd.types import Rollout, SampleId
from trainer.share import share_out


def rollouts(lengths, masks=None):
    return [
        Rollout(
            id=SampleId(0, i, 0),
            prompt_ids=(2,) * prompt,
            response_ids=(3,) * response,
            stop_reason="length",
            source="student",
            versions=(0, 0),
            loss_mask=None if masks is None else masks[i],
        )
        for i, (prompt, response) in enumerate(lengths)
    ]


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 60)), min_size=1, max_size=40),
    num_ranks=st.integers(1, 6),
    budget=st.integers(1, 400),
    reduction=st.sampled_from(["token_mean", "sequence_mean"]),
)
def test_whatever_the_lengths(lengths, num_ranks, budget, reduction):
    batch = rollouts(lengths)
    shares = share_out(batch, num_ranks=num_ranks, tokens_per_micro_batch=budget, reduction=reduction)
    assert len({len(share.micro_batches) for share in shares}) == 1  # nobody waits for a pass that never comes
    trained = [share.samples[place] for share in shares for places in share.micro_batches for place in places]
    assert sorted(trained) == list(range(len(batch)))
    total = sum(
        share.weights[place] * len(batch[share.samples[place]].response_ids)
        for share in shares
        for places in share.micro_batches
        for place in places
    )
    assert total == pytest.approx(1.0 if any(response for _, response in lengths) else 0.0)
    sizes = [len(r.token_ids) for r in batch]
    loads = [sum(sizes[share.samples[place]] for places in share.micro_batches for place in places) for share in shares]
    assert max(loads) - min(loads) <= max(sizes)
    for share in shares:
        assert share.samples  # also a rank without work can make a forward pass
        for places in share.micro_batches:
            longest = max((sizes[share.samples[place]] for place in places), default=0)
            assert len(places) <= 1 or longest * len(places) <= budget
    assert shares == share_out(batch, num_ranks=num_ranks, tokens_per_micro_batch=budget, reduction=reduction)


def test_tokens_that_are_masked_do_not_count():
    batch = rollouts([(1, 4), (1, 2)], masks=[(True, False, False, True), None])
    (share,) = share_out(batch, num_ranks=1, tokens_per_micro_batch=100, reduction="token_mean")
    assert share.weights == (0.25, 0.25)
    (share,) = share_out(batch, num_ranks=1, tokens_per_micro_batch=100, reduction="sequence_mean")
    assert share.weights == (0.25, 0.25)


def test_a_rank_with_fewer_passes_halves_its_largest():
    batch = rollouts([(1, 99), (1, 49), (1, 24), (1, 24)])
    one, other = share_out(batch, num_ranks=2, tokens_per_micro_batch=50, reduction="token_mean")
    assert one.samples == (0,) and other.samples == (1, 2, 3)
    assert one.micro_batches == ((0,), ()) and other.micro_batches == ((0,), (1, 2))
