"""LoRA (arXiv 2106.09685): low-rank adapters on a frozen base, by peft.

The base never changes, so only the adapter travels to the rollout engines and into checkpoints.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.export import write_tensors
from trainer.weights import Entry, Gathered, checkpoint_names, not_sharded, stream, tied_names

ADAPTER = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """The adapter."""

    r: int
    """Rank."""
    alpha: float
    """The adapter's output is multiplied by alpha / r."""
    targets: tuple[str, ...] | str
    """Module names, or "all-linear"."""
    dropout: float
    """On the adapter's input, while training."""


def add_adapter(model: Any, settings: LoraSettings) -> Any:
    """A `PeftModel` around the model: the base is frozen, the adapter's output is 0 at first (B = 0)."""
    from peft import LoraConfig, get_peft_model

    targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        target_modules=targets,
        lora_dropout=settings.dropout,
        bias="none",
        task_type="CAUSAL_LM",
    )
    # The adapter's precision is the trainer's to choose (its optimizer keeps float32 masters), not peft's.
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def adapter_weights(
    model: Any, *, gathered: Gathered = not_sharded, bucket_bytes: int = 2**30
) -> Iterator[tuple[str, torch.Tensor]]:
    """The adapter alone, under the names of peft's files."""
    entries = [
        Entry(name.replace(f".{ADAPTER}.", "."), (tensor,), tensor.detach)
        for name, tensor in model.named_parameters()
        if ".lora_" in name
    ]
    return stream(entries, gathered=gathered, bucket_bytes=bucket_bytes)


def merged_weights(
    model: Any, *, gathered: Gathered = not_sharded, bucket_bytes: int = 2**30
) -> Iterator[tuple[str, torch.Tensor]]:
    """The whole model with the adapter added to its base, under checkpoint names."""
    base = model.get_base_model()
    aliases = tied_names(base)
    entries = []
    for name, tensor in base.state_dict(keep_vars=True).items():
        if ".lora_" in name or name in aliases:
            continue
        layer_name, _, rest = name.partition(".base_layer.")
        plain = f"{layer_name}.{rest}" if rest else name
        if rest == "weight":
            entries.append(_merged_entry(plain, base.get_submodule(layer_name), tensor))
        else:
            entries.append(Entry(plain, (tensor,), tensor.detach))
    return stream(entries, gathered=gathered, bucket_bytes=bucket_bytes, convert=checkpoint_names(base))


def _merged_entry(name: str, layer: Any, weight: torch.Tensor) -> Entry:
    sources = (weight, layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight)
    return Entry(name, sources, lambda: weight.detach() + layer.get_delta_weight(ADAPTER).to(weight.dtype))


def write_adapter(folder: Path, model: Any, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
    """An adapter in peft's format, which peft and vLLM load."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder, "adapter_model", weights)
    model.peft_config[ADAPTER].save_pretrained(folder)


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """The base alone. peft's own switch also changes what requires a gradient, which the optimizer must not see."""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
