"""The pipeline with fake workers that finish in random order: what it promises must hold whatever the timing."""

import random
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gkd.interfaces import ScoredGroup
from gkd.rewards import RewardError
from gkd.scoring import GroupLimits
from gkd.stages import ByStep
from gkd.types import Completion, Rollout
from rollout.mixer import Mixer
from rollout.pipeline import NoRewards, NoRollouts, NoTeacher, Pipeline
from rollout.prompts import PromptStream
from rollout.stages import StagedMixer, StagedRollouts
from rollout.teacher_text import TeacherText
from rollout.tokenized import TokenizedRecord


class FakeRollouts:
    """Finishes prompts one by one, in random order, on a thread of its own."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.version = 0
        self.waiting = []
        self.lock = threading.Condition()
        self.stopped = False
        threading.Thread(target=self.run, daemon=True).start()

    def connect(self, post, deliver):
        self.post, self.deliver = post, deliver

    def submit(self, prompts):
        with self.lock:
            self.waiting += [(prompt, self.version) for prompt in prompts]
            self.lock.notify()

    def idle_s(self):
        return 0.0

    def stop(self):
        with self.lock:
            self.stopped = True
            self.lock.notify()

    def run(self):
        while True:
            with self.lock:
                self.lock.wait_for(lambda: self.waiting or self.stopped)
                if self.stopped:
                    return
                prompt, version = self.waiting.pop(self.random.randrange(len(self.waiting)))
            if self.random.random() < 0.1:
                time.sleep(0.002 * self.random.random())
            rollout = Rollout(
                id=prompt.id,
                prompt_ids=prompt.token_ids,
                response_ids=(5,) * (1 + prompt.id.prompt_index % 3),
                stop_reason="stop",
                source="student",
                versions=(version, self.version),
            )
            self.post(lambda rollout=rollout: self.deliver(rollout))


class FakeTeachers:
    """Scores a group with the ids of its members."""

    def __init__(self):
        self.groups = []

    def connect(self, post, deliver):
        self.post, self.deliver = post, deliver

    def idle_s(self):
        return 0.0

    def submit(self, key, rollouts):
        self.groups.append((key, tuple(r.id for r in rollouts)))
        kept = sum(rollout.source == "dataset" for rollout in rollouts)
        scored = ScoredGroup(
            signals=[r.id for r in rollouts], seconds=0.5, num_bytes=8, num_looked_up=kept, num_found=kept > 1
        )
        threading.Timer(0.0005, lambda: self.post(lambda: self.deliver(key, scored))).start()


def always(writers):
    """The same in all steps."""
    return StagedRollouts(ByStep([(1, writers)]), first_step=1)


def mixer(fraction, first_epoch=0):
    prompts = [(2,) * (1 + i % 4) for i in range(23)]
    records = [TokenizedRecord(i, p, Completion(prompt_ids=p, response_ids=(5, 1))) for i, p in enumerate(prompts)]
    return Mixer(
        PromptStream(records, seed=0, samples_per_prompt=1, first_epoch=first_epoch),
        seed=0,
        batch_size=6,
        on_policy_fraction=fraction,
        mixing="per_sample",
        max_new_tokens=4,
        limits={None: GroupLimits(tokens=20, sequences=3)},
    )


def pipeline_of(mixer, rollouts, teachers=None, rewards=None, *, steps=3, max_staleness=0, timeout_s=20, **options):
    """A pipeline of so many steps; `rollouts` are of one stage, or of several."""
    return Pipeline(
        mixer,
        rollouts if isinstance(rollouts, StagedRollouts) else always(rollouts),
        teachers or NoTeacher(),
        rewards or NoRewards(),
        first_step=1,
        last_step=steps,
        max_staleness=max_staleness,
        timeout_s=timeout_s,
        **options,
    )


def run(fraction, max_staleness, seed, steps=12, every_steps=1):
    """Batches of a run whose engines, teachers and trainer take random times."""
    rollouts, teachers, trainer = FakeRollouts(seed), FakeTeachers(), random.Random(seed)
    pipeline = pipeline_of(mixer(fraction), rollouts, teachers, steps=steps, max_staleness=max_staleness)
    batches = []
    with pipeline:
        pipeline.release(0)
        for step in range(1, steps + 1):
            batches.append(pipeline.take())
            time.sleep(0.003 * trainer.random())
            if step % every_steps == 0:
                rollouts.version = step
                pipeline.release(step)
    rollouts.stop()
    return batches, teachers


@settings(max_examples=60, deadline=None)
@given(
    fraction=st.sampled_from([0.0, 0.5, 1.0]),
    max_staleness=st.integers(0, 4),
    seed=st.integers(0, 2**20),
    data=st.data(),
)
def test_batches_come_in_order_whole_and_within_the_staleness_bound(fraction, max_staleness, seed, data):
    """The bound holds whatever the timing, because it is kept where prompts are sent out."""
    every_steps = data.draw(st.integers(1, max_staleness + 1))
    batches, _ = run(fraction, max_staleness, seed, every_steps=every_steps)
    assert [batch.step for batch in batches] == list(range(1, 13))
    identities = [rollout.id for batch in batches for rollout in batch.rollouts]
    assert len(set(identities)) == len(identities) == 12 * 6
    for batch in batches:
        assert batch.rollouts and tuple(r.id for r in batch.rollouts) == mixer(fraction).plan(batch.step).samples
        for group, signals in zip(batch.groups, batch.signals, strict=True):
            assert list(group) == signals
        given = {rollout.id for rollout in batch.rollouts if rollout.source == "dataset"}
        assert batch.num_looked_up == len(given)
        assert batch.num_found == sum(len(given.intersection(group)) > 1 for group in batch.groups)
        for rollout in batch.rollouts:
            if rollout.versions:
                assert 0 <= batch.step - 1 - rollout.versions[0] <= max_staleness
                assert rollout.versions[0] <= rollout.versions[1] < batch.step


def test_generation_runs_ahead_by_the_bound_and_no_further():
    """With a trainer that never finishes a step, exactly the steps within the window are generated."""
    rollouts, teachers = FakeRollouts(0), FakeTeachers()
    pipeline = pipeline_of(mixer(1.0), rollouts, teachers, steps=9, max_staleness=2)
    with pipeline:
        pipeline.release(0)
        assert [pipeline.take().step for _ in range(3)] == [1, 2, 3]
        time.sleep(0.1)
        assert {key[0] for key, _ in teachers.groups} == {1, 2, 3}
        pipeline.release(1)
        assert pipeline.take().step == 4


def staged_run(stages, max_staleness, seed):
    """Batches of a run whose stages have writers of their own, the plans, and the student's engines."""
    student, teacher, trainer = FakeRollouts(seed), FakeRollouts(seed + 1), random.Random(seed)
    writers = {"student": student, "teacher": TeacherText(teacher), "dataset": NoRollouts()}
    plans = StagedMixer(
        ByStep([(steps, mixer(float(who != "dataset"), 10 * number)) for number, (who, steps) in enumerate(stages)])
    )
    num_steps = sum(steps for _, steps in stages)
    staged = StagedRollouts(ByStep([(steps, writers[who]) for who, steps in stages]), first_step=1)
    pipeline = pipeline_of(plans, staged, FakeTeachers(), steps=num_steps, max_staleness=max_staleness)
    batches = []
    with pipeline:
        pipeline.release(0)
        for step in range(1, num_steps + 1):
            batches.append(pipeline.take())
            time.sleep(0.003 * trainer.random())
            student.version = step
            pipeline.release(step)
    for engines in (student, teacher):
        engines.stop()
    return batches, plans


@settings(max_examples=60, deadline=None)
@given(
    stages=st.lists(
        st.tuples(st.sampled_from(["teacher", "student", "dataset"]), st.integers(1, 4)), min_size=1, max_size=4
    ),
    max_staleness=st.integers(0, 4),
    seed=st.integers(0, 2**20),
)
def test_every_step_is_written_by_its_own_stage_whatever_the_window(stages, max_staleness, seed):
    """Over every border, in any order of who writes, while the stage before is still trained on."""
    batches, plans = staged_run(stages, max_staleness, seed)
    expected = [(number, who) for number, (who, steps) in enumerate(stages) for _ in range(steps)]
    assert [batch.step for batch in batches] == list(range(1, len(expected) + 1))
    for batch, (number, who) in zip(batches, expected, strict=True):
        assert batch.stage == number and {rollout.source for rollout in batch.rollouts} == {who}
        assert tuple(rollout.id for rollout in batch.rollouts) == plans.plan(batch.step).samples
        for rollout in batch.rollouts:
            if who == "student":
                assert 0 <= batch.step - 1 - rollout.versions[0] <= max_staleness
            else:
                assert rollout.versions is None
    identities = [rollout.id for batch in batches for rollout in batch.rollouts]
    assert len(set(identities)) == len(identities)


def test_the_student_writes_the_next_stage_while_the_teachers_text_is_still_trained_on():
    """The trainer never finishes a step: the window holds two steps of the teacher's and one of the student's."""
    student, teacher, asked = FakeRollouts(0), FakeRollouts(1), FakeTeachers()
    writers = StagedRollouts(ByStep([(2, TeacherText(teacher)), (4, student)]), first_step=1)
    mixers = StagedMixer(ByStep([(2, mixer(1.0)), (4, mixer(1.0, first_epoch=10))]))
    pipeline = pipeline_of(mixers, writers, asked, steps=6, max_staleness=2)
    with pipeline:
        pipeline.release(0)
        found = [pipeline.take() for _ in range(3)]
        assert [{rollout.source for rollout in batch.rollouts} for batch in found] == [{"teacher"}] * 2 + [{"student"}]
        time.sleep(0.1)
        assert {key[0] for key, _ in asked.groups} == {1, 2, 3}
        student.version = 1
        pipeline.release(1)
        assert {rollout.versions for rollout in pipeline.take().rollouts} == {(1, 1)}


def test_whoever_waits_for_a_batch_is_told_to_stop():
    stop = threading.Event()

    class Silent(FakeRollouts):
        def submit(self, prompts):
            threading.Timer(0.05, stop.set).start()

    pipeline = pipeline_of(mixer(1.0), Silent(0), stop_requested=stop.is_set)
    with pipeline:
        pipeline.release(0)
        assert pipeline.take() is None


def test_an_error_outside_reaches_whoever_waits():
    pipeline = pipeline_of(mixer(1.0), FakeRollouts(0))
    with pipeline, pytest.raises(OSError, match="the push failed"):
        pipeline.fail(OSError("the push failed"))
        pipeline.take()


def test_groups_depend_on_identity_and_not_on_arrival():
    (first, teachers_a), (second, teachers_b) = run(1.0, 0, seed=1), run(1.0, 0, seed=2)
    assert [b.rollouts for b in first] == [b.rollouts for b in second]
    assert sorted(teachers_a.groups) == sorted(teachers_b.groups)


def test_a_dead_worker_ends_the_run_with_its_own_error():
    class Dying(FakeRollouts):
        def submit(self, prompts):
            def fail():
                raise RuntimeError("the engine died")

            self.post(fail)

    pipeline = pipeline_of(mixer(1.0), Dying(0))
    with pipeline, pytest.raises(RuntimeError, match="the engine died"):
        pipeline.release(0)
        pipeline.take()


def test_silence_has_a_deadline():
    class Silent(FakeRollouts):
        def submit(self, prompts):
            pass

    pipeline = pipeline_of(mixer(1.0), Silent(0), timeout_s=0.2)
    with pipeline, pytest.raises(TimeoutError, match=r"rollout\.timeout_s"):
        pipeline.release(0)
        pipeline.take()


def test_without_engine_and_teacher_the_dataset_passes_through():
    with pipeline_of(mixer(0.0), NoRollouts(), steps=2) as pipeline:
        pipeline.release(0)
        batch = pipeline.take()
    assert all(rollout.source == "dataset" for rollout in batch.rollouts)
    assert set(batch.signals) == {None}


def test_an_engine_that_answers_but_finishes_nothing_has_a_deadline_too():
    class Busy(FakeRollouts):
        def submit(self, prompts):
            threading.Timer(0.01, lambda: self.post(lambda: self.submit(prompts))).start()

    pipeline = pipeline_of(mixer(1.0), Busy(0), timeout_s=0.3)
    with pipeline, pytest.raises(TimeoutError, match="no rollout"):
        pipeline.release(0)
        pipeline.take()


class FakeRewards:
    """Rewards a group with the prompts' numbers, late and out of order."""

    def __init__(self, *, delay_s=0.001, result=lambda rollouts: [float(r.id.prompt_index) for r in rollouts]):
        self.delay_s = delay_s
        self.result = result

    def connect(self, post, deliver):
        self.post, self.deliver = post, deliver

    def idle_s(self):
        return 0.0

    def submit(self, key, rollouts):
        delay = self.delay_s * (3 - key[1] % 3)
        threading.Timer(delay, lambda: self.post(lambda: self.deliver(key, self.result(rollouts)))).start()


def batches(rewards, *, teachers=None, steps=4, timeout_s=20.0):
    found = []
    teachers = teachers or FakeTeachers()
    with pipeline_of(mixer(0.5), FakeRollouts(0), teachers, rewards, steps=steps, timeout_s=timeout_s) as pipeline:
        for step in range(steps):
            pipeline.release(step)
            found.append(pipeline.take())
    return found


@pytest.mark.parametrize("teachers", [None, NoTeacher()])
def test_every_sample_of_a_batch_has_its_own_reward(teachers):
    for batch in batches(FakeRewards(), teachers=teachers):
        assert batch.rewards == tuple(float(r.id.prompt_index) for r in batch.rollouts)
        assert None not in batch.rewards


def test_without_a_function_there_are_no_rewards():
    assert [batch.rewards for batch in batches(NoRewards(), steps=2)] == [None, None]


def test_a_failing_function_ends_the_run_with_its_error():
    def fail(rollouts):
        raise RewardError("my_reward failed on 3 samples: KeyError: 'answer'")

    with pytest.raises(RewardError, match="my_reward failed"):
        batches(FakeRewards(result=fail))


def test_a_function_that_never_returns_is_named_when_time_is_up():
    class Silent(FakeRewards):
        def submit(self, key, rollouts):
            pass

    with pytest.raises(TimeoutError, match=r"0 rollouts, and of complete groups 0 signals and [1-9]\d* sets of rew"):
        batches(Silent(), timeout_s=0.5)
