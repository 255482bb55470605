"""A model's modules and their sizes, from its config alone: no weight is read, and little memory is used."""

from dataclasses import dataclass
from typing import Any

from gkd.errors import UserError
from launch.models import head_width
from launch.small_copy import head_stands_alone

Shapes = dict[str, tuple[int, int]]
"""Dotted module name -> (inputs, outputs)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What the preflight needs to know of a model's inside."""

    name: str
    """Its class in transformers."""
    recomputes: bool
    """Whether its layers can compute their activations again in the backward pass."""
    num_parameters: int
    """Tied ones counted once."""
    largest_parameter: int
    """Numbers in the largest of them."""
    modules: frozenset[str]
    """Dotted names of all modules."""
    linear: Shapes
    """Dotted name -> (inputs, outputs) of each linear layer, the head left out."""
    num_layers: int
    """Decoder layers."""
    hidden_size: int
    """Width between the layers."""
    intermediate_size: int
    """Width inside the feed-forward layers; of a mixture, what one token sees."""
    head_alone: bool = True
    """Whether its logits are its head applied to the last hidden states, so that these may travel in their place."""
    cache_numbers_per_token: int
    """Keys and values of one token over all layers, as in plain attention; compressed and windowed ones need less."""


def read_architecture(path: str, *, field: str) -> Architecture:
    """Build the model on torch's meta device, where tensors have shapes and nothing else.

    Args:
        path: folder or hub name of a causal language model.
        field: the config field that named it, for messages.

    Raises:
        UserError: if its config describes no model that can be built.
    """
    from transformers import AutoConfig

    return architecture_of(AutoConfig.from_pretrained(path), path=path, field=field)


def architecture_of(config: Any, *, path: str, field: str) -> Architecture:
    """Likewise, of a model that need not be on disk.

    Args:
        config: what it is built from.
        path: folder or hub name of the model that the config is of, or was made from, for messages.
        field: the config field that named it, for messages.

    Raises:
        UserError: if its config describes no model that can be built.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # numbers that do not fit together fail in each architecture's own way
        reason = f"{type(error).__name__}: {error}".partition("\n")[0].rstrip(".")
        raise UserError(
            field, path, f"cannot be built from its config: {reason}.", "Correct its config.json."
        ) from None
    text = config.get_text_config()
    sizes = [parameter.numel() for parameter in model.parameters()]
    return Architecture(
        name=type(model).__name__,
        recomputes=model.supports_gradient_checkpointing,
        num_parameters=sum(sizes),
        largest_parameter=max(sizes),
        modules=frozenset(name for name, _ in model.named_modules() if name),
        linear=_linear_layers(model),
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        intermediate_size=_intermediate_size(text),
        head_alone=head_stands_alone(config),
        cache_numbers_per_token=_cache_numbers(text),
    )


def _linear_layers(model: Any) -> Shapes:
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    found: Shapes = {}
    for name, module in model.named_modules():
        if module is head:
            continue
        if isinstance(module, torch.nn.Linear):
            found[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):  # GPT-2's linear layer, its weight the other way round
            found[name] = (module.nx, module.nf)
    return found


def _intermediate_size(config: Any) -> int:
    experts = getattr(config, "num_experts_per_tok", None)
    of_one_expert = getattr(config, "moe_intermediate_size", None)
    if experts and isinstance(of_one_expert, int):
        return experts * of_one_expert
    names = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
    known = [size for size in (getattr(config, name, None) for name in names) if isinstance(size, int)]
    return known[0] if known else 4 * config.hidden_size


def _cache_numbers(config: Any) -> int:
    width = head_width(config)
    if width is None:
        return 0
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width
