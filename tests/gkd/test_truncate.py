"""Truncation: which layers each strategy keeps, and that what is left computes as those layers do."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_config

from gkd.compress.strategies import STRATEGIES, kept_layers
from gkd.compress.truncate import truncate, truncated_config

ROWS = 64
TABLES = [
    ("first_k", 6, 3, (0, 1, 2)),
    ("first_k", 6, 1, (0,)),
    ("last_k", 6, 3, (3, 4, 5)),
    ("last_k", 6, 1, (5,)),
    ("both_ends", 6, 3, (0, 1, 5)),
    ("both_ends", 6, 4, (0, 1, 4, 5)),
    ("both_ends", 6, 1, (0,)),
    ("uniform", 6, 3, (0, 2, 5)),
    ("uniform", 7, 3, (0, 3, 6)),
    ("uniform", 7, 5, (0, 2, 3, 4, 6)),
    ("uniform", 12, 6, (0, 2, 4, 7, 9, 11)),
    ("uniform", 6, 2, (0, 5)),
    ("uniform", 6, 1, (0,)),
    ("spaced_from_first", 6, 3, (0, 2, 4)),
    ("spaced_from_first", 6, 4, (0, 1, 3, 4)),
    ("spaced_from_first", 28, 3, (0, 9, 18)),
    ("spaced_from_first", 5, 1, (0,)),
    ("every_other", 6, 3, (0, 2, 4)),
    ("every_other", 7, 4, (0, 2, 4, 6)),
    ("first_k_and_last", 6, 3, (0, 1, 5)),
    ("first_k_and_last", 12, 5, (0, 1, 2, 3, 11)),
    ("first_k_and_last", 6, 1, (5,)),
]


@pytest.mark.parametrize(("strategy", "num_layers", "num_kept", "layers"), TABLES)
def test_tables(strategy, num_layers, num_kept, layers):
    assert kept_layers(strategy, num_layers, num_kept) == layers


def test_every_strategy_has_a_row():
    assert {row[0] for row in TABLES} == set(STRATEGIES)


@given(strategy=st.sampled_from(sorted(STRATEGIES)), num_layers=st.integers(1, 200), data=st.data())
def test_every_strategy_keeps_k_layers_in_order(strategy, num_layers, data):
    halved = (num_layers + 1) // 2
    num_kept = halved if strategy == "every_other" else data.draw(st.integers(1, num_layers))
    layers = kept_layers(strategy, num_layers, num_kept)
    assert len(layers) == num_kept and list(layers) == sorted(set(layers))
    assert layers[0] >= 0 and layers[-1] < num_layers
    if strategy in ("first_k", "both_ends", "uniform", "every_other") or (num_kept > 1 and strategy != "last_k"):
        assert layers[0] == 0
    if strategy in ("last_k", "first_k_and_last") or (num_kept > 1 and strategy in ("both_ends", "uniform")):
        assert layers[-1] == num_layers - 1
    if num_kept == num_layers:
        assert layers == tuple(range(num_layers))


@pytest.mark.parametrize(
    ("strategy", "num_layers", "num_kept", "says"),
    [
        ("middle", 6, 3, "one of first_k"),
        ("first_k", 6, 0, "keep 1 to 6"),
        ("first_k", 6, 7, "keep 1 to 6"),
        ("every_other", 6, 2, "keeps 3 of 6"),
        ("every_other", 7, 3, "keeps 4 of 7"),
    ],
)
def test_what_a_strategy_cannot_keep(strategy, num_layers, num_kept, says):
    with pytest.raises(ValueError, match=says):
        kept_layers(strategy, num_layers, num_kept)


def config_of(architecture, *, num_layers=6, tied=None):
    """A config with layers of several kinds where the architecture has them."""
    from transformers import Gemma3TextConfig, GPTNeoXConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig, SmolLM3Config

    kinds = ["full_attention", "sliding_attention", "sliding_attention"] * num_layers
    common = {
        "vocab_size": ROWS,
        "hidden_size": 32,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 96,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    if tied is not None:
        common["tie_word_embeddings"] = tied
    grouped = common | {"num_key_value_heads": 1, "head_dim": 16}
    match architecture:
        case "gemma2":
            config = make_config("gemma2", rows=ROWS, tied=tied)
            config.layer_types, config.sliding_window = kinds[:num_layers], 4
        case "qwen2-windows":
            options = {key: value for key, value in grouped.items() if key != "head_dim"}
            return Qwen2Config(**options, use_sliding_window=True, sliding_window=4, max_window_layers=3)
        case "qwen3":
            return Qwen3Config(**grouped)
        case "qwen3_moe":
            experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
            return Qwen3MoeConfig(**grouped, **experts, decoder_sparse_step=1)
        case "gemma3":
            return Gemma3TextConfig(**grouped, layer_types=kinds[:num_layers], sliding_window=4)
        case "smollm3":
            options = {key: value for key, value in grouped.items() if key != "head_dim"}
            return SmolLM3Config(**options, no_rope_layers=[1, 1, 0, 1, 0, 0][:num_layers])
        case "gpt_neox":
            return GPTNeoXConfig(**common)
        case _:
            config = make_config(architecture, rows=ROWS, tied=tied)
            if hasattr(config, "layer_types"):
                config.layer_types = ["full_attention"] * num_layers
    config.num_hidden_layers = num_layers
    return config


def model_of(config, *, seed=0):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def ids():
    return torch.randint(2, ROWS, (2, 12), generator=torch.Generator().manual_seed(1))


def stack_of(model):
    """A model's layers, found by its kind and not by how many there are."""
    decoder = model.get_decoder()
    return decoder.h if hasattr(decoder, "h") else decoder.layers


def by_hand(model, layers):
    """Logits of the whole model where every other layer hands on what it was given."""
    model = copy.deepcopy(model)
    for index, layer in enumerate(stack_of(model)):
        if index not in layers:
            layer.forward = lambda hidden, *_args, **_kwargs: hidden
    return logits_of(model)


@torch.no_grad()
def logits_of(model):
    return model(input_ids=ids(), use_cache=False).logits


@torch.no_grad()
def greedy(model):
    """The next 8 tokens with caches, and without."""
    given = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(ids())
    cached, whole = (model.generate(ids(), attention_mask=mask, use_cache=use, **given) for use in (True, False))
    return cached, whole


CASES = [
    *((name, None) for name in ("llama", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3", "gpt2", "opt", "phi")),
    *((name, None) for name in ("gpt_neox", "smollm3", "qwen2-windows")),
    *(("llama", True), ("gpt2", False), ("gemma2", False), ("qwen2", True)),  # the others are the habit
]


@pytest.mark.parametrize(("architecture", "tied"), CASES)
@pytest.mark.parametrize("layers", [(0, 1, 2), (0, 2, 5), (4, 5), (3,)], ids=str)
def test_a_truncated_model_is_its_layers_applied_by_hand(architecture, tied, layers, tmp_path):
    from transformers import AutoModelForCausalLM

    whole = model_of(config_of(architecture, tied=tied))
    before, wanted, num_parameters = logits_of(whole), by_hand(whole, layers), whole.num_parameters()
    layer_parameters = [sum(p.numel() for p in layer.parameters()) for layer in stack_of(whole)]
    weight = whole.get_input_embeddings().weight
    student = truncate(whole, layers)
    assert student is whole and student.get_input_embeddings().weight is weight, "nothing is copied"
    assert student.num_parameters() == num_parameters - sum(layer_parameters) + sum(layer_parameters[i] for i in layers)
    torch.testing.assert_close(logits_of(student), wanted, rtol=0, atol=1e-5)
    assert not torch.allclose(wanted, before, atol=1e-2)
    with torch.no_grad():  # caches go by a layer's number
        kept = student(input_ids=ids()[:, :9], use_cache=True)
        steps = [kept.logits]
        for position in range(9, 12):
            step = student(input_ids=ids()[:, position : position + 1], past_key_values=kept.past_key_values)
            steps.append(step.logits)
    torch.testing.assert_close(torch.cat(steps, 1), wanted, rtol=0, atol=1e-4)
    cached, uncached = greedy(student)
    assert cached.shape[1] == 20 and torch.equal(cached, uncached)

    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert again.config.num_hidden_layers == len(layers) == len(stack_of(again))
    assert again.state_dict().keys() == student.state_dict().keys()
    torch.testing.assert_close(logits_of(again), wanted, rtol=0, atol=1e-5)
    assert torch.equal(greedy(again)[0], cached)


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3", "qwen2-windows", "smollm3", "gpt2"])
@pytest.mark.parametrize("layers", [(0, 1, 2), (0, 2, 5), (4, 5)], ids=str)
def test_a_config_lists_the_layers_that_are_left(architecture, layers):
    config = config_of(architecture)
    untouched = copy.deepcopy(config.to_dict())
    smaller = truncated_config(config, layers)
    assert config.to_dict() == untouched
    assert smaller.num_hidden_layers == len(layers)
    for name in ("layer_types", "no_rope_layers"):
        if hasattr(config, name):
            assert getattr(smaller, name) == [getattr(config, name)[index] for index in layers]
    if architecture == "qwen2-windows":
        assert smaller.max_window_layers == sum(index < 3 for index in layers)
    changed = {key for key, value in smaller.to_dict().items() if value != untouched.get(key)}
    assert changed <= {"num_hidden_layers", "n_layer", "layer_types", "no_rope_layers", "max_window_layers"}
    student = truncate(model_of(config), layers)
    ours = student.config.to_dict()
    assert {key: ours[key] for key in changed} == {key: smaller.to_dict()[key] for key in changed}


def test_lists_that_are_as_long_by_chance_stay():
    config = config_of("llama", num_layers=3)
    config.eos_token_id = [1, 2, 3]
    assert truncated_config(config, (0, 2)).eos_token_id == [1, 2, 3]


@pytest.mark.parametrize("layers", [(), (1, 0), (0, 0), (0, 6), (-1, 2)], ids=str)
def test_layers_that_no_model_has(layers):
    config = config_of("llama")
    with pytest.raises(ValueError, match=r"within 0\.\.5"):
        truncated_config(config, layers)


def refused():
    """Configs whose layers are not what a smaller model would build in their places."""
    from transformers import GPTNeoConfig, MiniMaxConfig, T5Config

    gpt2 = config_of("gpt2")
    gpt2.scale_attn_by_inverse_layer_idx = True
    moe = config_of("qwen3_moe")
    moe.mlp_only_layers = [1]
    neo = GPTNeoConfig(hidden_size=32, num_heads=2, num_layers=6, attention_types=[[["global", "local"], 3]])
    small = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48, "num_hidden_layers": 4}
    return {
        "a scale by number": (gpt2, (0, 2), "attn.scaling"),
        "experts by number": (moe, (0, 2), "mlp is 'Qwen3MoeSparseMoeBlock' and would be 'Qwen3MoeMLP'"),
        "a pattern": (neo, (0, 2), "attention_layers"),
        "decay by depth": (MiniMaxConfig(**small, num_local_experts=2), (0, 1), "num_hidden_layers"),
        "an encoder": (T5Config(), (0, 2), "encoder"),
    }


@pytest.mark.parametrize("name", refused().keys())
def test_what_cannot_be_truncated_says_why(name):
    config, layers, says = refused()[name]
    with pytest.raises(ValueError, match=says):
        truncated_config(config, layers)


def test_a_model_that_cannot_be_truncated_is_left_as_it_was():
    config = refused()["a scale by number"][0]
    model = model_of(config)
    before = logits_of(model)
    with pytest.raises(ValueError, match="layer 2 in the place of layer 1"):
        truncate(model, (0, 2))
    assert torch.equal(logits_of(model), before)
    assert len(stack_of(truncate(model, (0, 1)))) == 2, "here every layer keeps its place"
