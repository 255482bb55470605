"""A teacher behind a store: it scores given text once, in each form of signal, and what a model wrote every time."""

from dataclasses import replace

import numpy as np
import pytest
from stored_signals import KINDS, assert_same, cache, text
from tiny import VOCABULARY, save_model

from gkd.signals import SignalKind
from rollout.cached_teacher import CachedTeacher
from rollout.hf_teacher import HfTeacher, TeacherSettings

TEXTS = [text(prompt=(2, 3 + i), response=range(2, 4 + i)) for i in range(4)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "t", "gemma2")


@pytest.fixture
def teacher(model, tmp_path):
    """`teacher(kind)` is (a cached teacher on one folder, the sizes of the groups that the real one was given)."""

    def make(kind):
        given = []
        settings = TeacherSettings(
            name="t", model=model, dtype="float32", rows=VOCABULARY, signal=kind, top_k=3, temperature=0.7
        )

        class Counting(HfTeacher):
            def score(self, rollouts):
                given.append(len(rollouts))
                return super().score(rollouts)

        def start():
            given.append("started")
            return Counting(settings)

        return CachedTeacher(start, cache(tmp_path / "c", kind, rows=VOCABULARY)), given

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_the_second_time_comes_from_disk_without_a_teacher(teacher, kind):
    first, given = teacher(kind)
    made = first.score(TEXTS)
    assert (given, first.num_looked_up, first.num_found) == (["started", 4], 4, 0)
    again = first.score(TEXTS[::-1])
    later, never = teacher(kind)
    found = later.score([TEXTS[2], TEXTS[0]])
    assert (later.num_looked_up, later.num_found) == (2, 2)
    for ours, theirs in zip([*again, *found], [*made[::-1], made[2], made[0]], strict=True):
        assert_same(ours, theirs)
    if kind is SignalKind.HIDDEN_STATES:
        ours, theirs = later.head(), first.head()
        np.testing.assert_array_equal(ours.weight_VH, theirs.weight_VH)
        assert ours.finish == theirs.finish and ours.finish.softcap == 5.0
    assert given == ["started", 4] and never == []


def test_of_a_group_that_is_stored_in_part_the_rest_is_scored(teacher):
    cached, given = teacher(SignalKind.SAMPLED_LOGPROBS)
    half = cached.score(TEXTS[1:3])
    found = cached.score(TEXTS)
    assert (given, cached.num_looked_up, cached.num_found) == (["started", 2, 2], 4, 2)
    assert_same(found[1], half[0])
    assert_same(found[2], half[1])
    assert [len(signal.logprobs_T) for signal in found] == [len(one.response_ids) for one in TEXTS]
    for signal, one in zip(found, TEXTS, strict=True):
        (expected,) = HfTeacher(cached._teacher._settings).score([one])
        np.testing.assert_allclose(signal.logprobs_T, expected.logprobs_T, rtol=1e-4)


def test_what_a_model_wrote_is_scored_every_time_and_not_kept(teacher, tmp_path):
    cached, given = teacher(SignalKind.SAMPLED_LOGPROBS)
    own = [replace(one, source="student", versions=(0, 0)) for one in TEXTS]
    cached.score(own)
    cached.score(own)
    assert (given, cached.num_looked_up) == (["started", 4, 4], 0)
    assert not (tmp_path / "c").exists()
    cached.score([own[0], TEXTS[1]])
    assert (cached.num_looked_up, cached.num_found) == (1, 0)
    assert teacher(SignalKind.SAMPLED_LOGPROBS)[0].score([TEXTS[1]])


def test_the_same_text_twice_in_a_group(teacher):
    cached, given = teacher(SignalKind.SAMPLED_LOGPROBS)
    once, twice = cached.score([TEXTS[0], replace(TEXTS[0])])
    np.testing.assert_allclose(once.logprobs_T, twice.logprobs_T, rtol=1e-5)
    cached.score([TEXTS[0]])
    assert given == ["started", 2]


def test_a_teacher_that_sends_no_hidden_states_is_named_when_its_head_is_asked_for(tmp_path):
    class ScoresAlone:
        def score(self, rollouts):
            raise AssertionError("nothing is scored here")

    teacher = CachedTeacher(ScoresAlone, cache(tmp_path / "c", SignalKind.TOP_K, rows=VOCABULARY))
    with pytest.raises(TypeError, match="ScoresAlone sends no hidden states"):
        teacher.head()
