import pytest
from hypothesis import given
from hypothesis import strategies as st

from gkd.packing import pack, split_by_tokens

sequences = st.lists(
    st.tuples(st.lists(st.integers(2, 99), min_size=1, max_size=12), st.lists(st.integers(2, 99), max_size=12)),
    min_size=1,
    max_size=15,
)


@given(sequences, st.booleans())
def test_every_response_token_is_counted_once_and_no_prompt_token_is(pairs, share_rows):
    prompts, responses = [p for p, _ in pairs], [r for _, r in pairs]
    packed = pack(prompts, responses, share_rows=share_rows)
    assert packed.response_lengths == tuple(map(len, responses))
    assert packed.response_ids_T.tolist() == [token for response in responses for token in response]
    # The position before a response token holds the token before it: the prompt's last one for the first.
    flat = packed.input_ids_RS.flatten().tolist()
    before = [token for p, r in pairs for token in [*p, *r][len(p) - 1 : -1]] if any(responses) else []
    assert [flat[i] for i in packed.response_index_T.tolist()] == before
    # And the one after it is the response token itself, never a neighbour's.
    columns = packed.input_ids_RS.shape[1]
    for i, token in zip(packed.response_index_T.tolist(), packed.response_ids_T.tolist(), strict=True):
        assert (i + 1) % columns != 0
        assert flat[i + 1] == token


@given(sequences)
def test_sequences_that_share_a_row_have_positions_from_zero(pairs):
    prompts, responses = [p for p, _ in pairs], [r for _, r in pairs]
    packed = pack(prompts, responses, share_rows=True)
    lengths = sorted(len(p) + len(r) for p, r in pairs)
    if packed.position_ids_RS is None:
        assert packed.input_ids_RS.shape[0] == len(pairs)
        return
    starts = (packed.position_ids_RS == 0).sum().item()
    assert starts >= len(pairs)  # padding after the last sequence goes on counting
    assert packed.input_ids_RS.numel() >= sum(lengths)
    assert packed.input_ids_RS.shape[1] == lengths[-1]


def test_packing_needs_a_prompt_token():
    with pytest.raises(ValueError, match="every prompt"):
        pack([[]], [[3]], share_rows=False)
    with pytest.raises(ValueError, match="at least one sequence"):
        pack([], [], share_rows=False)


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 120), st.one_of(st.none(), st.integers(1, 5)))
def test_groups_keep_their_budget_and_hold_everything_once(lengths, budget, max_sequences):
    groups = split_by_tokens(lengths, budget, max_sequences=max_sequences)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= budget
        assert max_sequences is None or len(group) <= max_sequences
