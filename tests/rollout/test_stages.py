"""The data side of stages: epochs that go on, plans that begin anew, teachers that are asked where they are needed."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gkd.interfaces import ScoredGroup
from gkd.scoring import GroupLimits
from gkd.stages import ByStep
from gkd.types import Completion, Prompt, SampleId
from rollout.mixer import Mixer
from rollout.prompts import PromptStream
from rollout.stages import StagedMixer, StagedRollouts, StagedTeachers
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


class Writers:
    """Engines that note what they are asked, with a clock that the test sets."""

    def __init__(self):
        self.asked, self.connected, self.clock = [], 0, 0.0

    def connect(self, post, deliver):
        self.connected += 1
        self.deliver = deliver

    def submit(self, prompts):
        assert prompts, "asked for nothing"
        self.asked += [prompt.id.prompt_index for prompt in prompts]

    def idle_s(self):
        return self.clock


def prompts(*indices):
    return [Prompt(id=SampleId(0, i, 0), token_ids=(3,)) for i in indices]


def test_prompts_go_to_the_writers_of_their_step_and_all_deliver_alike():
    teacher, nobody, student, delivered = Writers(), Writers(), Writers(), []
    staged = StagedRollouts(ByStep([(2, teacher), (1, nobody), (1, student), (2, teacher)]), first_step=1)
    staged.connect(lambda callback: callback(), delivered.append)
    for step in (1, 2, 3, 4, 5, 6):
        staged.submit(step, [] if step == 3 else prompts(10 * step, 10 * step + 1))
    assert teacher.asked == [10, 11, 20, 21, 50, 51, 60, 61]
    assert (nobody.asked, student.asked) == ([], [40, 41])
    assert [writers.connected for writers in (teacher, nobody, student)] == [1, 1, 1]
    for writers in (student, teacher):  # the stages' order is not that of what finishes
        writers.deliver(writers)
    assert delivered == [student, teacher]


def test_only_those_are_waited_for_whose_turn_it_is():
    """The clock of all goes on; what counts is that of the newest step's writers."""
    teacher, nobody, student = Writers(), Writers(), Writers()
    staged = StagedRollouts(ByStep([(2, teacher), (1, nobody), (9, student)]), first_step=1)

    def pass_by(teacher_s, student_s):
        before = staged.idle_s()
        teacher.clock, student.clock = teacher.clock + teacher_s, student.clock + student_s
        return staged.idle_s() - before

    assert pass_by(1.0, 4.0) == 1.0  # before the first step is sent: its writers wait already
    staged.submit(1, prompts(1))
    assert pass_by(0.0, 4.0) == 0.0
    before = staged.idle_s()
    staged.submit(3, [])
    assert staged.idle_s() == before and pass_by(4.0, 4.0) == 0.0
    staged.submit(4, prompts(4))
    assert staged.idle_s() == before and pass_by(4.0, 0.5) == 0.5
    staged.submit(5, [])  # all samples of a step may be the dataset's
    assert pass_by(4.0, 2.0) == 2.0
    assert StagedRollouts(ByStep([(2, teacher), (9, student)]), first_step=3).idle_s() == student.clock
