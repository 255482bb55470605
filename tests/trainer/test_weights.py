import pytest
import torch
from tiny import make_model, save_model

from rollout.weights.object_store import ObjectStoreSender
from rollout.weights.packed import for_engine, held_modules
from trainer.weights import checkpoint_weights, tied_names


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gpt2", "opt", "phi", "gemma2"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_are_what_a_checkpoint_holds(architecture, tied, tmp_path):
    from safetensors.torch import load_file

    model = make_model(architecture, tied=tied)
    weights, aliases = list(checkpoint_weights(model, bucket_bytes=10_000)), tied_names(model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert {name for name, _ in weights} == saved.keys()
    for name, tensor in weights:
        assert torch.equal(tensor, saved[name])
    assert bool(aliases) == tied
    assert all(owner in saved and alias not in saved for alias, owner in aliases.items())


def test_fused_experts_travel_under_their_checkpoint_names(tmp_path):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=18,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
    )
    model = AutoModelForCausalLM.from_config(config)
    weights = list(checkpoint_weights(model, bucket_bytes=10_000))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert {name for name, _ in weights} == saved.keys()
    assert any("experts.0." in name for name in saved)
    assert not any("experts.0." in name for name in model.state_dict())
    for name, tensor in weights:
        assert torch.equal(tensor, saved[name])


@pytest.mark.parametrize("bucket_bytes", [1, 5_000, 10**9])
def test_buckets_carry_every_bit(bucket_bytes):
    tensors = [
        ("a", torch.randn(3, 5)),
        ("b", torch.randn(7).to(torch.bfloat16)),
        ("c", torch.randn(64, 33)),
        ("scalar", torch.tensor(2.5)),
        ("transposed", torch.randn(4, 6).T),
    ]
    messages = ObjectStoreSender(bucket_bytes=bucket_bytes).send(iter(tensors), {"alias": "c"})
    buckets = [message["bucket"] for message in messages]
    assert len(buckets) == {1: 5, 5_000: 3, 10**9: 1}[bucket_bytes]
    received = [pair for bucket in buckets for pair in bucket.tensors()]
    assert [name for name, _ in received] == [name for name, _ in tensors]
    for (_, sent), (_, got) in zip(tensors, received, strict=True):
        assert got.dtype == sent.dtype and torch.equal(got, sent)
    assert [alias for bucket in buckets for alias in bucket.tied] == ["alias"]


def test_a_tied_head_is_sent_only_to_engines_that_hold_one(tmp_path):
    model = make_model("qwen2", tied=True)
    (message,) = ObjectStoreSender(bucket_bytes=10**9).send(checkpoint_weights(model), tied_names(model))
    bucket = message["bucket"]
    holds_head = torch.nn.ModuleDict({"model": torch.nn.Linear(1, 1), "lm_head": torch.nn.Linear(1, 1)})
    has_none = torch.nn.ModuleDict({"model": torch.nn.Linear(1, 1)})
    with_head, without = (
        dict(for_engine(bucket.tensors(), bucket.tied, held_modules(engine))) for engine in (holds_head, has_none)
    )
    assert set(with_head) - set(without) == {"lm_head.weight"}
    assert torch.equal(with_head["lm_head.weight"], with_head["model.embed_tokens.weight"])


def test_a_saved_model_loads_again(tmp_path):
    from transformers import AutoModelForCausalLM

    path = save_model(tmp_path / "m", "gemma2")
    assert AutoModelForCausalLM.from_pretrained(path).config.final_logit_softcapping == 5.0
