"""Small copies of architectures with random weights: what is true of a model's structure is found out on them.

Legend: T response tokens, V rows.
"""

import copy
from typing import Any

import torch

from gkd.response_forward import ResponseForward
from launch.models import head_width

_ROWS = 512
_LAYERS = 2
_LARGE = 20_000_000
"""Parameters above which widths are cut too, so that the test takes no longer for large models."""
_TOO_LARGE = 200_000_000
"""Parameters that no copy may have."""
_LARGEST_LOGIT = 20.0
"""Large enough for a softcap to show, which bends logits at 30 or so."""


def small_copy(config: Any) -> Any:
    """A model with fewer layers and rows, and where it is large of less width, in float32 on the CPU, seen to run.

    Its weights are drawn from torch's generator, and only its embedding has a gradient.

    Args:
        config: of a causal language model in transformers; left as it is.

    Raises:
        ValueError: if it stays large.
        Exception: whatever an architecture raises whose config cannot be cut down so.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    _shorten(config.get_text_config())
    if _num_parameters(config) > _LARGE:
        _narrow(config.get_text_config())
        if (left := _num_parameters(config)) > _TOO_LARGE:
            raise ValueError(
                f"its config names its sizes in another way than most do, and {left:,} parameters are left"
            )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    # The gradient still goes through every layer, and needs memory for this alone.
    model.get_input_embeddings().weight.requires_grad_(True)
    return model


def head_stands_alone(config: Any) -> bool:
    """Whether a model's logits are its head applied to the last hidden states, as `gkd.head` knows it.

    If not, its hidden states cannot travel as a teacher's signal, and no critic can read them. True where no small
    copy can be made: the worker then finds out.

    Args:
        config: of a causal language model in transformers; left as it is.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model = small_copy(config)
            with torch.no_grad():
                logits_TV = model(input_ids=torch.arange(4).unsqueeze(0), use_cache=False).logits[0]
                model.get_output_embeddings().weight.mul_(_LARGEST_LOGIT / logits_TV.abs().max())
            return ResponseForward(model).has_own_head
        except Exception:  # each architecture fails in a way of its own
            return True


def _num_parameters(config: Any) -> int:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return int(AutoModelForCausalLM.from_config(copy.deepcopy(config)).num_parameters())


def _shorten(config: Any) -> None:
    """Fewer layers and rows. Special tokens may lie beyond the rows that are left."""
    config.num_hidden_layers = min(config.num_hidden_layers, _LAYERS)
    derived = isinstance(getattr(type(config), "layer_types", None), property)
    if getattr(config, "layer_types", None) and not derived:
        config.layer_types = _varied(config.layer_types, config.num_hidden_layers)
    config.vocab_size = min(config.vocab_size, _ROWS)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        token = getattr(config, name, None)
        if isinstance(token, list) or (isinstance(token, int) and token >= config.vocab_size):
            setattr(config, name, 0)


def _varied(kinds: list[str], number: int) -> list[str]:
    """The first kinds of layers, with another kind among them if there is one."""
    chosen = kinds[:number]
    others = [kind for kind in kinds if kind != chosen[0]]
    return [*chosen[:-1], others[0]] if others and len(set(chosen)) == 1 and number > 1 else chosen


def _narrow(config: Any) -> None:
    """Cut the widths; an attention head's stays, and so does how many heads share their keys and values."""
    for name in ("intermediate_size", "ffn_dim", "moe_intermediate_size", "shared_expert_intermediate_size"):
        if isinstance(width := getattr(config, name, None), int):
            setattr(config, name, min(width, 256))
    experts_used = getattr(config, "num_experts_per_tok", None) or 1
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if isinstance(number := getattr(config, name, None), int):
            setattr(config, name, min(number, max(16, 2 * experts_used)))
    head = head_width(config)
    if head is None:
        return
    heads = config.num_attention_heads
    shared_by = heads // (getattr(config, "num_key_value_heads", None) or heads)
    config.num_attention_heads = min(heads, max(2, shared_by))
    if getattr(config, "num_key_value_heads", None):
        config.num_key_value_heads = config.num_attention_heads // shared_by
    if getattr(config, "word_embed_proj_dim", None) == config.hidden_size:
        config.word_embed_proj_dim = config.num_attention_heads * head
    config.hidden_size = config.num_attention_heads * head
