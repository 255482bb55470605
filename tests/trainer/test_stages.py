"""A student that goes through several stages, with a real DeepSpeed engine."""

from dataclasses import replace

import pytest
import torch
from batches import distill, scored_batch, sft, stage_settings, step, student_settings
from tiny import VOCABULARY, make_model, save_model

from gkd.arrays import to_array
from gkd.config.objective import MomentMatchingObjective
from gkd.head import HeadWeights
from gkd.packing import pack
from gkd.response_forward import ResponseForward
from gkd.signals import HiddenStates
from gkd.stages import ByStep
from gkd.types import ScoredRollout
from trainer.lora import LoraSettings
from trainer.student import Student

CRITICS = MomentMatchingObjective.model_validate(
    {"type": "moment_matching", "warmup_inner_steps": 2, "warmup_steps": 1, "critic": {"init_scale": 0.3}}
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("student") / "qwen2", "qwen2")


@pytest.fixture(scope="module")
def teacher():
    return ResponseForward(make_model("llama", seed=5))


def staged(model, *stages, teacher=None, **changes):
    settings = student_settings(model, **changes)
    by_step = ByStep([(stage.steps, stage) for stage in stages])
    student = Student(replace(settings, stages=by_step))
    if teacher is not None:
        student.take_heads({"teacher": HeadWeights.of(teacher._model, rows=VOCABULARY)})
    return student


@torch.no_grad()
def hidden_batch(teacher, *, seed=0):
    """With the hidden states of the teacher, every other text the dataset's."""
    rollouts = [
        replace(sample.rollout, source=("student", "dataset")[i % 2])
        for i, sample in enumerate(scored_batch(seed=seed))
    ]
    packed = pack([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts], share_rows=False)
    parts = teacher.hidden(packed).split(list(packed.response_lengths))
    return [ScoredRollout(rollout=r, signal=HiddenStates(to_array(h))) for r, h in zip(rollouts, parts, strict=True)]


def test_each_stage_has_its_loss_and_a_schedule_of_its_own(model):
    student = staged(
        model,
        stage_settings(sft(), steps=2, learning_rate=1e-3, lr_schedule="linear"),
        stage_settings(distill(), steps=3, learning_rate=1e-2, warmup_steps=2),
    )
    batches = [scored_batch(seed=seed) for seed in range(5)]
    reports = [step(student, number, samples) for number, samples in enumerate(batches, 1)]
    assert [report.learning_rate for report in reports] == pytest.approx([1e-3, 5e-4, 5e-3, 1e-2, 1e-2])
    # The same updates by two students of one stage each: only the optimizer's state knows of the one before.
    first = Student(student_settings(model, objective=sft(), learning_rate=1e-3))
    assert step(first, 1, batches[0]).loss == reports[0].loss
    alone = Student(student_settings(model, objective=distill()))
    assert step(alone, 1, batches[2]).loss != pytest.approx(reports[2].loss)  # it has not learnt before


def test_the_optimizers_state_goes_on(model):
    """Two stages that are alike are one stage twice as long."""
    batches = [scored_batch(seed=seed) for seed in range(4)]
    whole = Student(student_settings(model))
    cut = staged(model, stage_settings(steps=2), stage_settings(steps=2))
    for number, samples in enumerate(batches, 1):
        assert step(cut, number, samples).loss == step(whole, number, samples).loss


STAGES = (
    stage_settings(CRITICS, steps=2, learning_rate=1e-3),
    stage_settings(CRITICS, steps=4, learning_rate=2e-3, lr_schedule="cosine"),
)


def critics_of(student):
    return [p.detach().clone() for ascent in student._stage._ascents for p in ascent._adversary.parameters()]


@pytest.mark.parametrize("saved_at", [1, 2, 4])
def test_a_saved_student_goes_on_bit_for_bit_from_any_stage(model, teacher, saved_at, tmp_path):
    batches = [hidden_batch(teacher, seed=seed) for seed in range(6)]

    def go_on(student, numbers):
        reports = [step(student, number, batches[number - 1]) for number in numbers]
        return [(report.loss, report.metrics, report.learning_rate) for report in reports]

    whole = staged(model, *STAGES, teacher=teacher)
    expected = go_on(whole, range(1, 7))
    first = staged(model, *STAGES, teacher=teacher)
    go_on(first, range(1, saved_at + 1))
    first.save(tmp_path)
    second = staged(model, *STAGES, teacher=teacher)
    second.load(tmp_path, completed_steps=saved_at)
    assert go_on(second, range(saved_at + 1, 7)) == expected[saved_at:]
    assert all(torch.equal(a, b) for a, b in zip(critics_of(second), critics_of(whole), strict=True))


def test_critics_begin_with_their_stage(model, teacher):
    """They are not those of the stage before, and not of the run's seed a second time."""
    student = staged(model, *STAGES, teacher=teacher)
    samples = hidden_batch(teacher)
    found = []
    for number in (1, 2, 3):
        step(student, number, samples)
        found.append(critics_of(student))
    moved = [(b - a).abs().max().item() for a, b in zip(found[0], found[1], strict=True)]
    begun = [(b - a).abs().max().item() for a, b in zip(found[1], found[2], strict=True)]
    assert min(begun) > 5 * max(moved)  # drawn anew, not moved by a step


def test_critics_that_are_not_in_the_checkpoint_are_missed(model, teacher, tmp_path):
    student = staged(model, *STAGES, teacher=teacher)
    step(student, 1, hidden_batch(teacher))
    student.save(tmp_path)
    (tmp_path / "adversaries.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"adversaries\.pt"):
        staged(model, *STAGES, teacher=teacher).load(tmp_path, completed_steps=1)


def test_critics_of_a_stage_that_has_not_begun_are_not_missed(model, teacher, tmp_path):
    stages = (stage_settings(sft(), steps=1), stage_settings(CRITICS, steps=2))
    student = staged(model, *stages, teacher=teacher)
    samples = hidden_batch(teacher)
    step(student, 1, samples)
    student.save(tmp_path)
    again = staged(model, *stages, teacher=teacher)
    again.load(tmp_path, completed_steps=1)
    assert step(again, 2, samples).loss == step(student, 2, samples).loss


def test_a_teacher_that_is_the_student_rests_in_a_stage_without(model):
    student = staged(
        model,
        stage_settings(sft(), steps=1),
        stage_settings(distill(type="reverse_kl"), steps=1),
        base_is_teacher=True,
        lora=LoraSettings(r=2, alpha=4.0, targets="all-linear", dropout=0.0),
    )
    asked = []
    view = student._teacher.view
    student._teacher.view = lambda samples: asked.append(len(samples)) or view(samples)
    unscored = [replace(sample, signal=None) for sample in scored_batch()]
    step(student, 1, unscored)
    assert asked == []
    assert step(student, 2, unscored).loss > 0 and asked
