"""The student's weights under the names that checkpoints, and so rollout engines, know them by."""

from typing import Any

import torch


def checkpoint_weights(model: Any) -> tuple[list[tuple[str, torch.Tensor]], dict[str, str]]:
    """What `save_pretrained` would write, each tensor once, and which names are aliases.

    transformers keeps some weights fused in memory under other names than its checkpoints have (mixtures of experts);
    a rollout engine loads checkpoint names, and what it is not sent it serves unchanged, silently.

    Args:
        model: a `PreTrainedModel`.

    Returns:
        (name, tensor) pairs, and alias -> name for tied tensors (a tied head, for most).
    """
    from transformers.core_model_loading import revert_weight_conversion

    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    owners: dict[tuple[int, torch.Size], str] = {}
    tied: dict[str, str] = {}
    aliases = model.all_tied_weights_keys
    for name in sorted(state, key=lambda name: name in aliases):  # owners before their aliases
        owner = owners.setdefault((state[name].data_ptr(), state[name].shape), name)
        if owner != name:
            tied[name] = owner
    unique = {name: tensor for name, tensor in state.items() if name not in tied}
    return list(revert_weight_conversion(model, unique).items()), tied
