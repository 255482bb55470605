import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gkd.seeds import generator
from gkd.types import Completion
from rollout.prompts import PromptStream
from rollout.tokenized import TokenizedRecord


def records(*counts):
    """So many records of each source; prompts tell them apart, one in seven records was dropped."""
    sources = [source for source, count in enumerate(counts) for _ in range(count)]
    return [TokenizedRecord(i + i // 6, (2 + i,), None, source) for i, source in enumerate(sources)]


def test_every_epoch_holds_every_prompt_once_in_another_order():
    stream = PromptStream(records(10), seed=1, samples_per_prompt=1)
    epochs = [[stream.sample(epoch * 10 + i) for i in range(10)] for epoch in range(3)]
    for number, epoch in enumerate(epochs):
        assert {prompt.id.epoch for prompt in epoch} == {number}
        assert sorted(prompt.id.prompt_index for prompt in epoch) == [0, 1, 2, 3, 4, 5, 7, 8, 9, 10]
        assert sorted(prompt.token_ids for prompt in epoch) == [(2 + i,) for i in range(10)]
    orders = {tuple(prompt.id.prompt_index for prompt in epoch) for epoch in epochs}
    assert len(orders) == 3


def test_without_weights_the_sources_are_one_and_the_order_is_the_seeds_permutation():
    """Fixed for good: a checkpoint's run must find the order that it began with."""
    for data in (records(9), records(4, 5)):
        stream = PromptStream(data, seed=5, samples_per_prompt=1)
        for epoch in range(3):
            order = generator(5, "prompt-order", epoch).permutation(9)
            assert [stream.sample(9 * epoch + i).token_ids for i in range(9)] == [(2 + i,) for i in order]
    assert [PromptStream(records(9), seed=5, samples_per_prompt=1).sample(i).token_ids[0] for i in range(9)] == [
        3, 7, 5, 2, 9, 8, 4, 6, 10,
    ]  # fmt: skip


@pytest.mark.parametrize("weights", [None, (1.0, 3.0)])
def test_the_stream_is_a_function_of_seed_and_number(weights):
    first, again, other = (
        PromptStream(records(4, 6), seed=seed, samples_per_prompt=2, weights=weights) for seed in (1, 1, 2)
    )
    order = [first.sample(i).id for i in range(9000)]
    assert [again.sample(i).id for i in reversed(range(9000))] == order[::-1]  # any order of asking
    resumed = PromptStream(records(4, 6), seed=1, samples_per_prompt=2, weights=weights)
    assert resumed.sample(8999).id == order[8999]
    assert [other.sample(i).id for i in range(9000)] != order
    assert len(set(order)) == 9000
    assert [i.sample_index for i in order[:4]] == [0, 1, 0, 1]
    assert order[0].prompt_index == order[1].prompt_index


@settings(max_examples=20, deadline=None)
@given(
    counts=st.lists(st.integers(1, 30), min_size=2, max_size=4),
    seed=st.integers(0, 2**32),
    samples_per_prompt=st.integers(1, 3),
    data=st.data(),
)
def test_with_weights_every_source_has_whole_epochs_of_its_own(counts, seed, samples_per_prompt, data):
    weights = data.draw(st.lists(st.floats(0.1, 10), min_size=len(counts), max_size=len(counts)))
    stream = PromptStream(records(*counts), seed=seed, samples_per_prompt=samples_per_prompt, weights=weights)
    source_of = {record.index: record.source for record in records(*counts)}
    ids = [stream.sample(i).id for i in range(600 * samples_per_prompt)]
    assert len(set(ids)) == len(ids)
    for source, count in enumerate(counts):
        own = [i for i in ids if source_of[i.prompt_index] == source and i.sample_index == 0]
        assert [i.epoch for i in own] == [k // count for k in range(len(own))]
        for epoch in range(len(own) // count):
            seen = {i.prompt_index for i in own[epoch * count : (epoch + 1) * count]}
            assert seen == {index for index, its_source in source_of.items() if its_source == source}


def test_weights_are_the_shares_of_the_samples_whatever_the_sizes():
    stream = PromptStream(records(100, 3, 40), seed=0, samples_per_prompt=1, weights=[5, 3, 2])
    source_of = {record.index: record.source for record in records(100, 3, 40)}
    number = 40_000  # ten blocks of draws
    ids = [stream.sample(i).id for i in range(number)]
    drawn = [source_of[i.prompt_index] for i in ids]
    for source, share in enumerate((0.5, 0.3, 0.2)):
        assert abs(drawn.count(source) / number - share) < 4 * np.sqrt(share * (1 - share) / number)
    for first in (0, 3500, 39_000):  # at every time, not only in the end
        assert 0.43 < drawn[first : first + 1000].count(0) / 1000 < 0.57
    rare = [i.epoch for i in ids if source_of[i.prompt_index] == 1]
    assert rare == [k // 3 for k in range(len(rare))] and len(set(ids)) == number


def test_sources_of_equal_size_are_shuffled_apart():
    stream = PromptStream(records(50, 50), seed=3, samples_per_prompt=1, weights=[1, 1])
    orders = {0: [], 1: []}
    for i in range(300):
        prompt = stream.sample(i)
        if prompt.id.epoch == 0:
            orders[prompt.token_ids[0] >= 52].append((prompt.token_ids[0] - 2) % 50)
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(50)) and orders[0] != orders[1]


def test_a_prompt_brings_its_completion():
    completion = Completion(prompt_ids=(3,), response_ids=(4, 5, 1), loss_mask=(True, False, True))
    stream = PromptStream([TokenizedRecord(0, (3, 4, 5), completion)], seed=0, samples_per_prompt=1)
    assert stream.sample(7).completion == completion and stream.sample(7).token_ids == (3, 4, 5)
