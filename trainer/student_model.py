"""The student as torch sees it: loaded, with or without an adapter, and in which mode it runs when."""

from typing import Any, Literal

import torch

from gkd.model_loading import load_causal_lm
from trainer.lora import LoraSettings, add_adapter


def load_student(
    path: str,
    *,
    dtype: str,
    init: Literal["pretrained", "random"],
    seed: int,
    lora: LoraSettings | None,
    gradient_checkpointing: bool,
) -> Any:
    """The student, or a `PeftModel` around it."""
    model = load_causal_lm(path, dtype=dtype, init=init, seed=seed)
    if gradient_checkpointing:
        assert model.supports_gradient_checkpointing, "refused before the workers start"
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if lora is None:
        return model
    torch.manual_seed(seed)  # the adapter's A is random
    model = add_adapter(model, lora)
    return model.eval()


def training_mode(model: Any, *, dropout: bool) -> None:
    """Make ready for a training step.

    Everything that acts by a module's `training` flag stays off unless dropout is asked for, but for two things that
    are asked for on their own: an adapter's dropout, and activations that are computed again (transformers does so in
    training mode only).
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.train(dropout)
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout.train()
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            module.training = True
            if not dropout:
                _without_own_dropout(module)


def _without_own_dropout(layer: Any) -> None:
    """Some layers drop units by their own `training` flag and a number (OPT), not by a module that is switched off."""
    for name, value in vars(layer).items():
        if "dropout" in name and isinstance(value, float):
            setattr(layer, name, 0.0)
