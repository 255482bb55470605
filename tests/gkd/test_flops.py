"""What distillation costs beside continued pretraining (arXiv 2305.14864), from models' own parameters."""

import pytest
import torch
from tiny import make_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

from gkd.compress.flops import multiplied_parameters, vanilla_kd_ratio
from gkd.compress.strategies import kept_layers
from gkd.compress.truncate import truncated_config

SHAPES = {
    "llama 1.1B": LlamaConfig(
        hidden_size=2048, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4, intermediate_size=5632
    ),
    "qwen3 0.6B": Qwen3Config(
        vocab_size=151_936, hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, intermediate_size=3072, tie_word_embeddings=True,
    ),
    "gpt2 124M": GPT2Config(),
}  # fmt: skip


def built(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", SHAPES)
def test_at_half_depth_the_teacher_makes_training_about_half_as_dear_again(name):
    config = SHAPES[name]
    half = truncated_config(config, kept_layers("first_k", config.num_hidden_layers, config.num_hidden_layers // 2))
    ratio = vanilla_kd_ratio(built(half), built(config))
    assert 1.3 <= ratio <= 1.7
    assert ratio < 5 / 3, "the head is not cut in half: without it the ratio were (3 / 2 + 1) / (3 / 2)"


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_count_what_torch_counts(tied):
    """In units of 2 P a token: 1 forward, 3 with the backward pass, but for attention's own products."""
    config = make_config("llama", tied=tied, rows=512)
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.zeros(1, 8, dtype=torch.long)
    unit = 2 * multiplied_parameters(model) * ids.numel()
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        model(ids)
    with FlopCounterMode(display=False) as training:
        model(ids, labels=ids).loss.backward()
    assert forward.get_total_flops() == pytest.approx(unit, rel=0.05)
    assert training.get_total_flops() == pytest.approx(3 * unit, rel=0.05)
