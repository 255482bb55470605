"""Objectives that couple tokens, add up and weigh, in the trainer: how the batch is split changes nothing."""

from dataclasses import replace
from pathlib import Path

import naive
import pytest
import torch
from batches import scored_batch, step, student_settings
from pydantic import TypeAdapter
from tiny import save_model
from transformers import AutoModelForCausalLM

from gkd.config.objective import ObjectiveConfig
from trainer.student import Student

ROOT = Path(__file__).resolve().parents[2]
EVERYTHING = {
    "type": "sum",
    "token_weight": {"type": "exponential_decay", "half_life": 4},
    "terms": [
        {"weight": 0.5, "objective": {"type": "minillm", "gamma": 0.9, "temperature": 2.0}},
        {"objective": {"type": "sampled_kl", "gamma": 0.5, "token_weight": {"type": "entropy"}}},
        {"weight": 0.1, "objective": {"type": "sft"}},
    ],
}


def mixed_batch():
    """Half of it the student's, with the log-probabilities of an older student."""
    found = []
    for i, sample in enumerate(scored_batch(rows=18)):
        own = sample.rollout
        changes = (
            {"logprobs": tuple(-1.0 - 0.1 * t for t in range(len(own.response_ids)))}
            if i % 2
            else {"source": "dataset", "versions": None, "stop_reason": "dataset"}
        )
        found.append(replace(sample, rollout=replace(own, **changes)))
    return found


def test_the_split_into_micro_batches_changes_nothing(tmp_path):
    model = save_model(tmp_path / "qwen2", "qwen2", rows=24)
    objective = TypeAdapter(ObjectiveConfig).validate_python(EVERYTHING)
    batch, reports = mixed_batch(), []
    for tokens in (4096, 16):
        student = Student(student_settings(model, objective=objective, rows=18))
        steps = [step(student, number, batch, tokens_per_micro_batch=tokens) for number in (1, 2)]
        assert steps[0].num_micro_batches == 1 if tokens == 4096 else steps[0].num_micro_batches > 2
        reports.append(steps)
    for whole, split in zip(*reports, strict=True):
        assert split.loss == pytest.approx(whole.loss, rel=1e-4)
        assert split.grad_norm == pytest.approx(whole.grad_norm, rel=1e-4)
        assert split.metrics == pytest.approx(whole.metrics, rel=1e-3, abs=1e-5)
    names = {"minillm_single_step", "minillm_clip_fraction", "sampled_kl_token_weight", "sft_nll", "token_weight"}
    assert names <= reports[0][0].metrics.keys()
    assert reports[0][0].metrics["minillm_ratio"] != pytest.approx(1)


@pytest.mark.parametrize("kind", ["sampled_kl", "minillm"])
def test_the_mean_weight_is_that_of_the_tokens_that_count(tmp_path, kind):
    model = save_model(tmp_path / "qwen2", "qwen2", rows=24)
    objective = {"type": kind, "token_weight": {"type": "exponential_decay", "half_life": 4}}
    student = Student(
        student_settings(model, objective=TypeAdapter(ObjectiveConfig).validate_python(objective), rows=18)
    )
    batch = mixed_batch()
    own = [s.rollout for s in batch if s.rollout.source == "student"]
    weights = [0.5 ** (place / 4) for rollout in own for place in range(len(rollout.response_ids))]
    metrics = step(student, 1, batch, tokens_per_micro_batch=16).metrics
    assert metrics["token_weight"] == pytest.approx(sum(weights) / len(weights), rel=1e-5)


def test_a_users_own_objective_and_token_weight_train(tmp_path):
    """Against what both say in float64 of the first step's logits; the second step finds another student."""
    model = save_model(tmp_path / "qwen2", "qwen2", rows=24)
    objective = {
        "type": "custom",
        "path": f"{ROOT / 'docs' / 'examples' / 'my_objective.py'}:SureReverseKl",
        "kwargs": {"bonus": 0.1},
        "token_weight": {
            "type": "custom",
            "path": "custom_objectives:by_id",
            "kwargs": {"step": 0.5},
            "teacher": False,
        },
    }
    batch, found = mixed_batch(), {}
    for tokens in (4096, 16):
        settings = student_settings(model, objective=TypeAdapter(ObjectiveConfig).validate_python(objective), rows=18)
        student = Student(settings)
        found[tokens] = [step(student, number, batch, tokens_per_micro_batch=tokens) for number in (1, 2)]
    losses, entropies, weights = zip(*(said(model, sample) for sample in batch), strict=True)
    first, second = found[4096]
    assert first.loss == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)
    assert first.metrics["entropy"] == pytest.approx(torch.cat(entropies).mean().item(), rel=1e-4)
    assert first.metrics["token_weight"] == pytest.approx(torch.cat(weights).mean().item(), rel=1e-5)
    assert second.loss < first.loss and first.grad_norm > 0
    for whole, split in zip(found[4096], found[16], strict=True):
        assert (split.loss, split.grad_norm) == pytest.approx((whole.loss, whole.grad_norm), rel=1e-4)


@torch.no_grad()
def said(model, sample):
    """Weighted loss, entropy and weight of each token of one sample, after a forward pass of its own."""
    rollout = sample.rollout
    ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
    logits_SV = AutoModelForCausalLM.from_pretrained(model).eval()(input_ids=ids).logits[0].double()
    student_TV = logits_SV[len(rollout.prompt_ids) - 1 : -1, :18]
    teacher_TV = sample.signal.tensor().double()
    entropy_T = torch.special.entr(student_TV.softmax(-1)).sum(-1)
    loss_T = teacher_TV.softmax(-1).amax(-1) * naive.reverse_kl(student_TV, teacher_TV) - 0.1 * entropy_T
    weight_T = 1 + 0.5 * torch.tensor(rollout.response_ids)
    return weight_T * loss_T, entropy_T, weight_T
