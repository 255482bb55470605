"""Several teachers as one, with teachers that answer when the test says so."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gkd.interfaces import MixedSignals, ScoredGroup
from gkd.types import Rollout, SampleId
from rollout.teacher_router import MixedTeachers, RoutedTeachers


class FakePool:
    def __init__(self, name, idle_s=0.0):
        self.name = name
        self.open = []
        self.idle = idle_s

    def connect(self, post, deliver):
        self.post, self.deliver = post, deliver

    def submit(self, key, rollouts):
        self.open.append((key, list(rollouts)))

    def finish(self, number):
        """Answer one of the open groups."""
        key, rollouts = self.open.pop(number)
        signals = self.score_now([rollouts])[0]
        scored = ScoredGroup(
            signals=signals, seconds=0.5, num_bytes=8 * len(rollouts), num_looked_up=2, num_found=self.name == "b"
        )
        self.post(lambda: self.deliver(key, scored))

    def score_now(self, groups):
        return [(self.name, tuple(rollout.id for rollout in group)) for group in groups]

    def idle_s(self):
        return self.idle


def group(number, teacher=None, size=2):
    return [
        Rollout(
            id=SampleId(0, number, i), prompt_ids=(2,), response_ids=(3,), stop_reason="stop", source="student",
            versions=(0, 0), teacher=teacher,
        )
        for i in range(size)
    ]  # fmt: skip


def connected(router):
    delivered = []
    router.connect(lambda callback: callback(), lambda key, scored: delivered.append((key, scored)))
    return delivered


def names(router_groups):
    return tuple(rollout.id for rollout in router_groups)


@given(st.lists(st.sampled_from("abc"), max_size=12), st.randoms(use_true_random=False))
def test_every_group_goes_to_its_teacher_and_comes_back_once_in_any_order(teachers, random):
    pools = {name: FakePool(name) for name in "abc"}
    router = RoutedTeachers(pools)
    delivered = connected(router)
    for number, teacher in enumerate(teachers):
        router.submit((1, number), group(number, teacher))
    assert not delivered
    while waiting := [pool for pool in pools.values() if pool.open]:
        pool = random.choice(waiting)
        pool.finish(random.randrange(len(pool.open)))
    assert {key: scored.signals for key, scored in delivered} == {
        (1, number): (teacher, names(group(number))) for number, teacher in enumerate(teachers)
    }
    assert len(delivered) == len(teachers)


@given(st.integers(0, 8), st.randoms(use_true_random=False))
def test_a_mixture_comes_back_once_when_all_have_answered_in_any_order(count, random):
    pools = [FakePool(name) for name in "abc"]
    router = MixedTeachers(pools, (0.5, 0.3, 0.2))
    delivered = connected(router)
    for number in range(count):
        router.submit((1, number), group(number))
    answers = dict.fromkeys(((1, number) for number in range(count)), 0)
    while waiting := [pool for pool in pools if pool.open]:
        pool = random.choice(waiting)
        place = random.randrange(len(pool.open))
        answers[pool.open[place][0]] += 1
        pool.finish(place)
        assert {key for key, _ in delivered} == {key for key, number in answers.items() if number == 3}
    assert len(delivered) == count
    for key, scored in delivered:
        assert scored.signals == MixedSignals(
            tuple((name, names(group(key[1]))) for name in "abc"), (0.5, 0.3, 0.2)
        )  # in the weights' order, whoever was first
        assert (scored.seconds, scored.num_bytes) == (1.5, 48)
        assert (scored.num_looked_up, scored.num_found) == (6, 1)


def test_evaluation_gets_the_signals_in_its_own_order():
    groups = [group(0, "b"), group(1, "a"), group(2, "b")]
    routed = RoutedTeachers({name: FakePool(name) for name in "abc"})
    assert [signals[0] for signals in routed.score_now(groups)] == ["b", "a", "b"]
    assert [signals[1] for signals in routed.score_now(groups)] == [names(g) for g in groups]
    mixed = MixedTeachers([FakePool("a"), FakePool("b")], (0.5, 0.5)).score_now(groups[:2])
    assert mixed == [MixedSignals((("a", names(g)), ("b", names(g))), (0.5, 0.5)) for g in groups[:2]]


def test_idle_time_is_the_mean():
    pools = [FakePool("a", 1.0), FakePool("b", 4.0)]
    assert MixedTeachers(pools, (0.5, 0.5)).idle_s() == 2.5
    assert RoutedTeachers({pool.name: pool for pool in pools}).idle_s() == 2.5


def test_a_group_of_several_teachers_is_our_own_mistake():
    router = RoutedTeachers({"a": FakePool("a"), "b": FakePool("b")})
    for mixed in ([*group(0, "a"), *group(1, "b")], [replace(group(0)[0], teacher=None)]):
        with pytest.raises(AssertionError):
            router.submit((1, 0), mixed)
