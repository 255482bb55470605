"""The data side of stages: epochs that go on, plans that begin anew, teachers that are asked where they are needed."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gkd.interfaces import ScoredGroup
from gkd.scoring import GroupLimits
from gkd.stages import ByStep
from gkd.types import Completion
from rollout.mixer import Mixer
from rollout.prompts import PromptStream
from rollout.stages import StagedMixer, StagedTeachers
from rollout.tokenized import TokenizedRecord


def records(*counts):
    """So many of each source."""
    sources = [source for source, count in enumerate(counts) for _ in range(count)]
    completion = Completion(prompt_ids=(3,), response_ids=(5, 1))
    return [TokenizedRecord(i, (3,), completion, source) for i, source in enumerate(sources)]


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(1, 9), min_size=2, max_size=3),
    weighted=st.booleans(),
    samples_per_prompt=st.integers(1, 3),
    num_samples=st.integers(1, 60),
    first_epoch=st.integers(0, 4),
)
def test_the_epoch_after_some_samples_is_the_first_that_none_is_of(
    counts, weighted, samples_per_prompt, num_samples, first_epoch
):
    stream = PromptStream(
        records(*counts),
        seed=1,
        samples_per_prompt=samples_per_prompt,
        weights=range(1, len(counts) + 1) if weighted else None,
        first_epoch=first_epoch,
    )
    epochs = {stream.sample(number).id.epoch for number in range(num_samples)}
    assert min(epochs) == first_epoch and max(epochs) + 1 == stream.epoch_after(num_samples)


def test_whole_blocks_of_weighted_draws_are_counted():
    stream = PromptStream(records(3, 5), seed=1, samples_per_prompt=1, weights=(1.0, 1.0))
    for num_samples in (4095, 4096, 4097, 9000):
        assert 1 + max(stream.sample(i).id.epoch for i in range(num_samples)) == stream.epoch_after(num_samples)


def mixer(first_epoch, *, seed=0, batch_size=4, fraction=0.5):
    return Mixer(
        PromptStream(records(7), seed=seed, samples_per_prompt=1, first_epoch=first_epoch),
        seed=seed,
        batch_size=batch_size,
        on_policy_fraction=fraction,
        mixing="per_sample",
        max_new_tokens=4,
        limits={None: GroupLimits(tokens=20, sequences=3)},
    )


def test_a_stages_plans_are_those_of_its_own_steps():
    mixers = [mixer(0), mixer(5, seed=9, batch_size=6)]
    staged = StagedMixer(ByStep([(3, mixers[0]), (2, mixers[1])]))
    for step, (stage, local) in {1: (0, 1), 3: (0, 3), 4: (1, 1), 5: (1, 2)}.items():
        plan, own = staged.plan(step), mixers[stage].plan(local)
        assert (plan.step, plan.stage) == (step, stage)
        assert (plan.samples, plan.on_policy, plan.off_policy) == (own.samples, own.on_policy, own.off_policy)
        assert plan.groups == own.groups


class Noted:
    """Teachers that note what they are asked; some for so long idle."""

    def __init__(self, idle_s):
        self.asked, self.connected, self._idle_s = [], 0, idle_s

    def connect(self, post, deliver):
        self.connected += 1
        self.deliver = deliver

    def submit(self, key, rollouts):
        self.asked.append(key)
        self.deliver(key, ScoredGroup(signals=rollouts, seconds=0.0, num_bytes=0))

    def idle_s(self):
        return self._idle_s


def test_a_group_goes_to_the_teachers_of_its_step():
    none, real, delivered = Noted(0.0), Noted(2.5), []
    staged = StagedTeachers(ByStep([(2, none), (1, real), (3, none), (1, real)]))
    staged.connect(lambda callback: callback(), lambda key, scored: delivered.append(key))
    for step in (7, 2, 3, 6, 1, 4):  # a window over a border mixes their order
        staged.submit((step, 0), [])
    assert [step for step, _ in none.asked] == [2, 6, 1, 4] and [step for step, _ in real.asked] == [7, 3]
    assert len(delivered) == 6 and (none.connected, real.connected) == (1, 1)
    assert staged.idle_s() == pytest.approx(2.5)
