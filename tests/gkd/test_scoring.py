from hypothesis import given
from hypothesis import strategies as st

from gkd.packing import split_by_tokens
from gkd.scoring import GroupLimits, scoring_groups

SAMPLES = st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), st.integers(1, 40)), max_size=40)
LIMITS = {"b": GroupLimits(60, 3), "a": GroupLimits(100, 8), "c": GroupLimits(30, 1)}


@given(SAMPLES)
def test_every_sample_is_in_one_group_of_its_teacher_and_within_its_limits(samples):
    teachers, lengths = [name for name, _ in samples], [length for _, length in samples]
    groups = scoring_groups(teachers, lengths, LIMITS)
    assert sorted(i for group in groups for i in group) == list(range(len(samples)))
    for group in groups:
        [teacher] = {teachers[i] for i in group}
        limits = LIMITS[teacher]
        assert len(group) <= limits.sequences
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= limits.tokens
    order = [teachers[group[0]] for group in groups]
    assert order == sorted(order, key=list(LIMITS).index)


@given(SAMPLES)
def test_one_teacher_scores_the_groups_that_it_always_did(samples):
    """Fixed for good: which sequences share a batch moves the last bits of a run's losses."""
    lengths = [length for _, length in samples]
    found = scoring_groups([None] * len(samples), lengths, {None: GroupLimits(100, 8)})
    assert found == split_by_tokens(lengths, 100, max_sequences=8)
