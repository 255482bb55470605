"""The student as its own teacher: its moving average, its base; and prompts that the teacher alone reads."""

from dataclasses import replace

import pytest
import torch
from batches import distill, scored_batch, step, student_settings
from tiny import save_model

from gkd.config.divergence import ReverseKl
from gkd.signals import FullLogits
from gkd.types import ScoredRollout
from trainer.lora import LoraSettings, merged_weights
from trainer.share import share_out
from trainer.step import TrainingDiverged
from trainer.student import Student
from trainer.weights import not_sharded

LORA = LoraSettings(r=4, alpha=8.0, targets="all-linear", dropout=0.0)
DECAY = 0.7
BATCHES = [scored_batch(seed=seed, rows=18) for seed in range(4)]
OWN_PROMPTS = [None, (3, 4, 5), None, (6,), (7, 8, 9, 10, 11, 12), (2,), None, (5, 5)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("student") / "qwen2", "qwen2", rows=24, tied=True)


def moved(model, *, steps=2, **changes):
    """A student that learns from its average, after some steps with signals of another teacher.

    At the start the student is its average, and a divergence between them has no gradient.
    """
    student = Student(student_settings(model, rows=18, **({"ema_decay": DECAY} | changes)))
    own, student._batches._teacher = student._batches._teacher, student._sent
    for number in range(1, steps + 1):
        step(student, number, BATCHES[number - 1])
    student._batches._teacher = own
    return student


def unscored(batch, prompts=(None,) * 8):
    """The samples without signals; `prompts` are the teacher's own."""
    return [
        ScoredRollout(rollout=replace(sample.rollout, teacher_prompt_ids=own), signal=None)
        for sample, own in zip(batch, prompts, strict=True)
    ]


def trained(student):
    return {name: p.detach().clone() for name, p in student._model.named_parameters() if p.requires_grad}


def scored_by(path, weights, samples):
    """The samples with signals of a model of its own: that of `path`, with some weights replaced."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    assert not loaded.load_state_dict(weights, strict=False).unexpected_keys
    scored = []
    for rollout in (sample.rollout for sample in samples):
        prompt = rollout.scored_prompt_ids
        with torch.no_grad():
            whole = loaded(input_ids=torch.tensor([(*prompt, *rollout.response_ids)])).logits[0]
        signal = FullLogits.from_tensor(whole[len(prompt) - 1 : -1, :18].contiguous())
        scored.append(ScoredRollout(rollout=rollout, signal=signal))
    return scored


MODES = pytest.mark.parametrize(
    "changes",
    [{}, {"zero_stage": 2}, {"lora": LORA}, {"engine": {"dtype": "bfloat16"}, "zero_stage": 1}],
    ids=["plain", "zero_2", "lora", "bfloat16"],
)


@MODES
def test_the_average_is_the_closed_form_of_all_weights_so_far(model, changes):
    """a_n = d^n w_0 + (1 - d) sum_i d^(n - i) w_i, of what is trained and of nothing else."""
    student = moved(model, steps=0, **changes)
    seen = [trained(student)]
    assert student._average.state_dict().keys() == seen[0].keys()
    student._batches._teacher = student._sent
    for number in (1, 2, 3):
        step(student, number, BATCHES[number - 1])
        seen.append(trained(student))
    for name, average in student._average.state_dict().items():
        expected = DECAY**3 * seen[0][name].double()
        for i in (1, 2, 3):
            expected += (1 - DECAY) * DECAY ** (3 - i) * seen[i][name].double()
        assert average.dtype == torch.float32
        torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-7, msg=name)
    assert any(not torch.equal(seen[0][name], seen[3][name]) for name in seen[0])


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_it_teaches_as_a_model_of_its_own_with_the_averaged_weights_would(model, zero_stage):
    """Losses and updates, on prompts of the teacher's own too."""
    student, twin = (moved(model, zero_stage=zero_stage) for _ in range(2))
    twin._batches._teacher = twin._sent
    for number in (3, 4):
        samples = unscored(BATCHES[number - 1], OWN_PROMPTS)
        weights = {name: average.clone() for name, average in twin._average.state_dict().items()}
        reports = step(student, number, samples), step(twin, number, scored_by(model, weights, samples))
        assert reports[0].loss == pytest.approx(reports[1].loss, rel=1e-4) and reports[0].loss > 1e-4
        assert reports[0].grad_norm == pytest.approx(reports[1].grad_norm, rel=1e-3)
    for (name, ours), theirs in zip(trained(student).items(), trained(twin).values(), strict=True):
        if not name.endswith("k_proj.bias"):  # its gradient is rounding noise, which Adam scales up
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-4, msg=name)


def test_of_an_adapter_it_is_the_base_with_the_averaged_adapter(model):
    student = moved(model, lora=LORA)
    with student._average.in_place():
        weights = dict(merged_weights(student._model, gathered=not_sharded, bucket_bytes=5_000))
    samples = unscored(BATCHES[2], OWN_PROMPTS)
    twin = moved(model, lora=LORA)
    twin._batches._teacher = twin._sent
    expected = step(twin, 3, scored_by(model, weights, samples))
    found = step(student, 3, samples)
    assert found.loss == pytest.approx(expected.loss, rel=1e-4) and found.loss > 1e-4
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-3)


def test_a_few_tokens_at_a_time_it_teaches_the_same(model, monkeypatch):
    """Its head is applied within the student's own passes, whose gradients must not see it."""
    whole = step(moved(model), 3, unscored(BATCHES[2]))
    monkeypatch.setattr("gkd.logits._DIRECT", 0)
    monkeypatch.setattr("gkd.logits.CHUNK_TOKENS", {"cpu": 3})
    parts = step(moved(model), 3, unscored(BATCHES[2]))
    assert parts.loss == pytest.approx(whole.loss, rel=1e-4)
    assert parts.grad_norm == pytest.approx(whole.grad_norm, rel=1e-3)


@MODES
def test_the_students_weights_are_where_they_were_after_it_taught(model, changes):
    student = moved(model, **changes)
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in student._model.named_parameters()}
    with student._average.in_place():
        changed = [n for n, p in student._model.named_parameters() if not torch.equal(p, before[n][1])]
    assert changed
    student._teacher.view(unscored(BATCHES[0]))
    with pytest.raises(RuntimeError), student._average.in_place():
        raise RuntimeError
    for name, parameter in student._model.named_parameters():
        assert parameter.data_ptr() == before[name][0] and torch.equal(parameter, before[name][1])


@MODES
def test_a_saved_student_and_its_average_go_on_bit_for_bit(model, changes, tmp_path):
    whole = moved(model, **changes)
    whole.save(tmp_path)
    again = Student(student_settings(model, rows=18, **({"ema_decay": DECAY} | changes)))
    again.load(tmp_path, completed_steps=2)
    for number in (3, 4):
        samples = unscored(BATCHES[number - 1], OWN_PROMPTS)
        assert step(again, number, samples).loss == step(whole, number, samples).loss
    for name, average in whole._average.state_dict().items():
        assert torch.equal(again._average.state_dict()[name], average)


def test_at_the_start_it_is_the_student_itself_but_for_what_it_reads(model):
    student = moved(model, steps=0)
    assert step(student, 1, unscored(BATCHES[0])).loss == pytest.approx(0, abs=1e-6)
    assert step(moved(model, steps=0), 1, unscored(BATCHES[0], OWN_PROMPTS)).loss > 1e-2


def test_a_step_that_is_given_up_leaves_the_average_as_it_was(model):
    student = moved(model)
    student._batches._teacher = student._sent
    before = {name: average.clone() for name, average in student._average.state_dict().items()}
    batch = scored_batch(rows=18)
    batch[3].signal.logits_TV[0, 0] = float("nan")
    with pytest.raises(TrainingDiverged):
        step(student, 3, batch)
    assert all(torch.equal(average, before[name]) for name, average in student._average.state_dict().items())


def test_evaluation_compares_with_what_the_loss_compares_with(model):
    student, twin = (moved(model, objective=distill(type="reverse_kl")) for _ in range(2))
    samples = unscored(BATCHES[2], OWN_PROMPTS)
    [share] = share_out([s.rollout for s in samples], num_ranks=1, tokens_per_micro_batch=40, reduction="token_mean")
    total, count = student.divergence(samples, share, ReverseKl(type="reverse_kl"), 1.0)
    assert total / count == pytest.approx(step(twin, 3, samples).loss, rel=1e-4)


def test_the_base_reads_prompts_of_its_own(model):
    """Self-distillation with privileged context: the base is told more than the student."""
    student = moved(model, lora=LORA, ema_decay=None, base_is_teacher=True)
    twin = moved(model, lora=LORA, ema_decay=None)
    samples = unscored(BATCHES[2], OWN_PROMPTS)
    expected = step(twin, 3, scored_by(model, {}, samples))
    found = step(student, 3, samples)
    assert found.loss == pytest.approx(expected.loss, rel=1e-4)
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-3)
