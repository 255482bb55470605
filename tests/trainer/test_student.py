"""The student with a real DeepSpeed engine, against plain torch."""

import pytest
import torch
from batches import PACKING_LENGTHS, distill, scored_batch, sft, step, student_settings
from naive import forward_kl
from tiny import EOS, save_model

from gkd.objectives.base import ObjectiveOutput
from trainer.step import TrainingDiverged
from trainer.student import Student


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("student") / "qwen2", "qwen2", rows=24)


def plain_losses(path, batches, *, rows, grad_clip, reduction="token_mean"):
    """Forward KL, AdamW and clipping in plain torch, one sequence at a time, the loss in float64."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    matrices = [p for p in plain.parameters() if p.ndim >= 2]
    vectors = [p for p in plain.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    losses = []
    for batch in batches:
        per_sequence = []
        for sample in batch:
            r = sample.rollout
            logits = plain(input_ids=torch.tensor([r.token_ids])).logits[0, len(r.prompt_ids) - 1 : -1, :rows]
            per_sequence.append(forward_kl(logits, sample.signal.tensor()))
        if reduction == "token_mean":
            loss = torch.cat(per_sequence).mean()
        else:
            loss = torch.stack([losses_T.mean() for losses_T in per_sequence]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), grad_clip)
        optimizer.step()
        losses.append(loss.item())
    return losses, plain


BATCHES = [scored_batch(seed=seed, rows=18) for seed in range(3)]


@pytest.mark.parametrize("zero_stage", [0, 2])
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_steps_equal_plain_torch(model, zero_stage, reduction):
    objective = distill().model_copy(update={"reduction": reduction})
    student = Student(student_settings(model, zero_stage=zero_stage, grad_clip=0.5, rows=18, objective=objective))
    losses = [step(student, i + 1, batch, reduction=reduction).loss for i, batch in enumerate(BATCHES)]
    expected, plain = plain_losses(model, BATCHES, rows=18, grad_clip=0.5, reduction=reduction)
    assert losses == pytest.approx(expected, rel=1e-4)
    for name, parameter in student._model.named_parameters():
        if name.endswith("k_proj.bias"):
            continue  # softmax does not see it: its gradient is rounding noise, which Adam scales up
        torch.testing.assert_close(parameter, plain.get_parameter(name), rtol=1e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_micro_batches_change_losses_by_rounding_only(model, zero_stage):
    runs = []
    for tokens in (4096, 40, 1):
        student = Student(student_settings(model, zero_stage=zero_stage, rows=18))
        reports = [step(student, i + 1, batch, tokens_per_micro_batch=tokens) for i, batch in enumerate(BATCHES)]
        runs.append(reports)
    assert [report.num_micro_batches for report in runs[0]] == [1, 1, 1]
    assert runs[1][0].num_micro_batches > 2
    assert runs[2][0].num_micro_batches == len(PACKING_LENGTHS)
    for reports in runs[1:]:
        for report, whole in zip(reports, runs[0], strict=True):
            assert report.loss == pytest.approx(whole.loss, rel=1e-5)
            assert report.grad_norm == pytest.approx(whole.grad_norm, rel=1e-3)


def test_every_response_token_counts_and_no_prompt_token(model):
    """What reaches the objective is exactly the response tokens, whatever the prompts' lengths."""
    seen = []

    def recording(inputs):
        seen.append(inputs)
        loss = inputs.student_logits_TV.logsumexp(-1)
        return ObjectiveOutput(loss_T=loss, mask_T=inputs.mask_T)

    student = Student(student_settings(model, rows=18))
    student._stage._step._objective = recording
    batch = scored_batch(rows=18)
    report = step(student, 1, batch)
    assert report.num_tokens == sum(response for _, response in PACKING_LENGTHS)
    counted = [token for inputs in seen for token in inputs.response_ids_T.tolist()]
    assert sorted(counted) == sorted(token for s in batch for token in s.rollout.response_ids)
    assert EOS not in counted  # no rollout emitted a stop token, and none was invented
    assert all(bool(inputs.mask_T.all()) for inputs in seen)


def test_sft_is_the_negative_log_likelihood_of_the_response(model):
    from transformers import AutoModelForCausalLM

    batch = [s.__class__(rollout=s.rollout, signal=None) for s in scored_batch()]
    loss = step(Student(student_settings(model, objective=sft(), rows=24)), 1, batch).loss
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for sample in batch:
        r = sample.rollout
        log_p = plain(input_ids=torch.tensor([r.token_ids])).logits[0, len(r.prompt_ids) - 1 : -1].log_softmax(-1)
        total -= log_p.gather(-1, torch.tensor(r.response_ids).unsqueeze(-1)).sum().item()
        count += len(r.response_ids)
    assert loss == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_a_saved_student_goes_on_bit_for_bit(model, zero_stage, tmp_path):
    def losses(student, numbers):
        return [step(student, number, BATCHES[number - 1]).loss for number in numbers]

    whole = losses(Student(student_settings(model, zero_stage=zero_stage, rows=18)), (1, 2, 3))
    first = Student(student_settings(model, zero_stage=zero_stage, rows=18))
    assert losses(first, (1, 2)) == whole[:2]
    first.save(tmp_path)
    second = Student(student_settings(model, zero_stage=zero_stage, rows=18))
    second.load(tmp_path, completed_steps=2)
    assert losses(second, (3,)) == whole[2:]


def test_bfloat16_teacher_logits_are_raised_before_the_loss(model):
    batch = scored_batch(rows=18, dtype=torch.bfloat16)
    assert batch[0].signal.tensor().dtype == torch.bfloat16
    loss = step(Student(student_settings(model, rows=18)), 1, batch).loss
    expected, _ = plain_losses(model, [batch], rows=18, grad_clip=1.0)
    assert loss == pytest.approx(expected[0], rel=1e-5)


def test_dropout_acts_only_where_asked_for(tmp_path):
    path = save_model(tmp_path / "gpt2", "gpt2")
    plain, dropped = (Student(student_settings(path, dropout=dropout)) for dropout in (False, True))
    rollouts = [s.rollout for s in scored_batch()]
    assert abs(step(plain, 1, scored_batch()).loss - step(dropped, 1, scored_batch()).loss) > 1e-4
    # After a step with dropout, as before: never where log-probabilities are compared.
    assert dropped.logprobs(rollouts) == dropped.logprobs(rollouts)


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_a_gradient_that_is_no_number_ends_the_run(model, zero_stage):
    """A square root at 0: the loss is a number, and its slope is not."""
    own = distill(type="custom", path=f"{__file__}:at_zero")
    student = Student(student_settings(model, rows=18, zero_stage=zero_stage, objective=own))
    with pytest.raises(TrainingDiverged, match="gradient"):
        step(student, 1, scored_batch(rows=18))


def at_zero(student_logits_TV, teacher_logits_TV):
    """0, with a slope that is no number."""
    return (0 * student_logits_TV.sum(-1)).sqrt()


def test_a_loss_that_is_no_number_changes_nothing(model):
    student = Student(student_settings(model, rows=18))
    before = {name: p.clone() for name, p in student._model.named_parameters()}
    batch = scored_batch(rows=18)
    batch[3].signal.logits_TV[0, 0] = float("nan")
    with pytest.raises(TrainingDiverged, match="learning_rate"):
        step(student, 1, batch)
    assert all(torch.equal(p, before[name]) for name, p in student._model.named_parameters())
