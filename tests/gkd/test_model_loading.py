import torch
from tiny import make_model, save_model

from gkd.model_loading import load_causal_lm


def test_attention_softcaps_are_computed(tmp_path):
    """transformers' default attention drops Gemma-2's softcap without a word; served and trained models then differ."""
    loaded = load_causal_lm(save_model(tmp_path / "m", "gemma2"), dtype="float32", init="pretrained")
    ids = torch.arange(2, 18).view(2, 8)
    exact = make_model("gemma2")
    exact.set_attn_implementation("eager")
    torch.testing.assert_close(loaded(input_ids=ids).logits, exact(input_ids=ids).logits)


def test_random_weights_come_from_the_seed(tmp_path):
    path = save_model(tmp_path / "m", "llama")
    first, again, other = (load_causal_lm(path, dtype="float32", init="random", seed=seed) for seed in (1, 1, 2))
    weight = [model.get_output_embeddings().weight for model in (first, again, other)]
    assert torch.equal(weight[0], weight[1]) and not torch.equal(weight[0], weight[2])


def test_models_load_in_eval_mode_and_the_asked_for_precision(tmp_path):
    path = save_model(tmp_path / "m", "gpt2")
    model = load_causal_lm(path, dtype="bfloat16", init="pretrained")
    assert not model.training and model.dtype == torch.bfloat16
