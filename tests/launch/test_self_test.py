import time

import pytest
import torch
from tiny import make_config

from gkd.config.objective import DistillObjective, RlGkdObjective, SeqKdObjective, SftObjective, SumObjective
from gkd.errors import UserError
from gkd.objectives import build_objective
from gkd.objectives.composite import WeightedTokens
from launch.self_test import self_test

KINDS = [
    {"type": "forward_kl"},
    {"type": "reverse_kl"},
    {"type": "generalized_jsd", "beta": 0.1},
    {"type": "generalized_jsd", "beta": 0.9, "normalize": True},
    {"type": "skew_forward_kl"},
    {"type": "skew_reverse_kl"},
    {"type": "total_variation"},
    {"type": "adaptive_kl"},
]


def distill(divergence, **options):
    return DistillObjective.model_validate({"type": "distill", "divergence": divergence} | options)


def save(folder, config):
    config.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "opt", "phi", "gemma2"])
def test_every_architecture_and_divergence_passes(architecture, tmp_path):
    path = save(tmp_path, make_config(architecture))
    for divergence in KINDS:
        for options in ({}, {"temperature": 0.5, "reduction": "sequence_mean"}):
            assert self_test(path, distill(divergence, **options), field="student.model") is None


def test_what_measures_a_divergence_beside_something_else_passes(tmp_path):
    path = save(tmp_path, make_config("llama"))
    for divergence in KINDS:
        rewarded = {"type": "rl_gkd", "divergence": divergence, "alpha": 0.3}
        assert self_test(path, RlGkdObjective.model_validate(rewarded), field="student.model") is None
        terms = [{"objective": {"type": "sft"}}, {"objective": rewarded}, {"objective": {"type": "minillm"}}]
        whole = SumObjective.model_validate({"type": "sum", "reduction": "sequence_mean", "terms": terms})
        assert self_test(path, whole, field="student.model") is None


def test_token_weights_may_read_what_the_test_does_not_have(tmp_path):
    path = save(tmp_path, make_config("llama"))
    weight = {"token_weight": {"type": "custom", "path": "custom_objectives:by_all_inputs", "teacher": True}}
    weighted = distill(KINDS[0], **weight)
    assert isinstance(build_objective(weighted), WeightedTokens)  # its own trial has it all
    assert self_test(path, weighted, field="student.model") is None
    terms = [{"objective": weighted.model_dump()}, {"objective": {"type": "sft"}}]
    whole = SumObjective.model_validate({"type": "sum", "terms": terms} | weight)
    assert self_test(path, whole, field="student.model") is None


def test_what_is_random_elsewhere_stays_as_it_was(tmp_path):
    path = save(tmp_path, make_config("llama"))
    torch.manual_seed(1)
    expected = torch.randn(3)
    torch.manual_seed(1)
    self_test(path, distill(KINDS[0]), field="student.model")
    assert torch.equal(torch.randn(3), expected)


@pytest.mark.parametrize(
    ("name", "found"), [("cross_entropy", "is [0-9.]+"), ("signed_difference", "has a gradient of [0-9.]+")]
)
def test_what_is_no_divergence_is_refused(tmp_path, name, found):
    path = save(tmp_path, make_config("llama"))
    custom = {"type": "custom", "path": f"divergences:{name}"}
    with pytest.raises(UserError, match=f"{found} where teacher and student are the same model") as caught:
        self_test(path, distill(custom), field="student.model")
    assert caught.value.field == "objective.divergence" and caught.value.value == f"divergences:{name}"
    of_sequences = SeqKdObjective.model_validate({"type": "seq_kd", "form": "divergence", "divergence": custom})
    with pytest.raises(UserError, match=f"{found} where teacher and student are the same model"):
        self_test(path, of_sequences, field="student.model")
    rewarded = {"type": "rl_gkd", "divergence": custom}
    with pytest.raises(UserError, match=f"{found} where teacher and student are the same model"):
        self_test(path, RlGkdObjective.model_validate(rewarded), field="student.model")
    sft, whole = (
        {"objective": {"type": "sft"}},
        {"objective": {"type": "distill", "divergence": {"type": "reverse_kl"}}},
    )
    for number, own in enumerate((rewarded, {"type": "distill", "divergence": custom}), start=2):
        terms = [sft, *[whole] * (number - 1), {"weight": 0.1, "objective": own}]
        with pytest.raises(UserError, match=f"{found} where teacher and student are the same model") as caught:
            self_test(path, SumObjective.model_validate({"type": "sum", "terms": terms}), field="student.model")
        assert caught.value.field == f"objective.terms.{number}.objective.divergence"


def test_large_models_are_tested_as_quickly(tmp_path):
    from transformers import Qwen3Config

    eight_billion = Qwen3Config(
        vocab_size=151_936,
        hidden_size=4096,
        intermediate_size=12_288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        eos_token_id=151_645,
        pad_token_id=151_643,
    )
    path = save(tmp_path, eight_billion)
    started = time.monotonic()
    assert self_test(path, distill(KINDS[0]), field="student.model") is None
    assert time.monotonic() - started < 10  # about 1 s on an idle machine


def test_architectures_that_cannot_be_trained_are_refused_without_a_teacher_too(tmp_path):
    from transformers import BertConfig, Llama4TextConfig

    sft = SftObjective(type="sft")
    encoder = BertConfig(vocab_size=18, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    with pytest.raises(UserError, match="BertLMHeadModel, which sees the tokens") as caught:
        self_test(save(tmp_path / "encoder", encoder), sft, field="student.model")
    assert caught.value.field == "student.model"
    chunked = Llama4TextConfig(
        vocab_size=18,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=32,
        intermediate_size_mlp=32,
        num_local_experts=2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    with pytest.raises(UserError, match="cannot be trained on packed responses"):
        self_test(save(tmp_path / "chunked", chunked), sft, field="student.model")


def test_a_model_that_cannot_be_made_small_is_no_mistake(tmp_path):
    from transformers import Gemma3nTextConfig

    note = self_test(save(tmp_path, Gemma3nTextConfig()), distill(KINDS[0]), field="student.model")
    assert note is not None and note.startswith("the self-test was left out")
