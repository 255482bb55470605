"""The teacher's engines in the student's place: a fake engine that answers late, last prompt first."""

import threading

import pytest

from gkd.scoring import GroupLimits
from gkd.stages import ByStep
from gkd.types import Rollout
from rollout.mixer import Mixer
from rollout.pipeline import NoRewards, NoTeacher, Pipeline
from rollout.prompts import PromptStream
from rollout.stages import StagedRollouts
from rollout.teacher_text import TeacherText
from rollout.tokenized import TokenizedRecord


class FakeEngines:
    """Answers with the prompt it was given, backwards; says that a student wrote it, as engines do."""

    def __init__(self):
        self.asked = []

    def connect(self, post, deliver):
        self.post, self.deliver = post, deliver

    def submit(self, prompts):
        self.asked += [prompt.token_ids for prompt in prompts]
        for place, prompt in enumerate(reversed(prompts)):
            rollout = Rollout(
                id=prompt.id,
                prompt_ids=prompt.token_ids,
                response_ids=prompt.token_ids[::-1],
                stop_reason="length",
                source="student",
                versions=(0, 0),
                teacher_prompt_ids=prompt.teacher_prompt_ids,
            )
            send = lambda rollout=rollout: self.post(lambda: self.deliver(rollout))  # noqa: E731
            threading.Timer(0.001 * place, send).start()

    def idle_s(self):
        return 2.5


@pytest.fixture
def batches():
    """Two steps, with what the engines were asked; every other record has a prompt for the teacher alone."""
    records = [
        TokenizedRecord(i, (2, 3, 4 + i), None, teacher_prompt_ids=(9, 9, 4 + i) if i % 2 else None) for i in range(8)
    ]
    mixer = Mixer(
        PromptStream(records, seed=0, samples_per_prompt=2),
        seed=0,
        batch_size=6,
        on_policy_fraction=1.0,
        mixing="per_step",
        max_new_tokens=4,
        limits={None: GroupLimits(tokens=20, sequences=3)},
    )
    engines = FakeEngines()
    writers = StagedRollouts(ByStep([(2, TeacherText(engines))]), first_step=1)
    pipeline = Pipeline(
        mixer, writers, NoTeacher(), NoRewards(), first_step=1, last_step=2, max_staleness=0, timeout_s=20
    )
    found = []
    with pipeline:
        for version in range(2):
            pipeline.release(version)
            found.append(pipeline.take())
    return mixer, engines, found


def test_the_student_learns_the_teachers_answer_to_its_own_prompt(batches):
    mixer, engines, found = batches
    for batch in found:
        plan = mixer.plan(batch.step)
        assert tuple(rollout.id for rollout in batch.rollouts) == plan.samples
        for rollout, prompt in zip(batch.rollouts, plan.on_policy, strict=True):
            assert rollout.prompt_ids == prompt.token_ids
            assert rollout.response_ids == prompt.scored_prompt_ids[::-1]
            assert rollout.scored_prompt_ids == prompt.scored_prompt_ids
            assert (rollout.source, rollout.versions, rollout.stop_reason) == ("teacher", None, "length")
    asked = [prompt.scored_prompt_ids for step in (1, 2) for prompt in mixer.plan(step).on_policy]
    assert engines.asked == asked and {ids[0] for ids in asked} == {2, 9}


def test_waiting_for_the_teachers_engines_is_measured(batches):
    _, engines, found = batches
    assert all(batch.rollout_s > 0 for batch in found)
    assert TeacherText(engines).idle_s() == 2.5
