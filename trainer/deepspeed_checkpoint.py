"""Weights out of a DeepSpeed checkpoint, whatever its ZeRO stage and number of ranks, without starting an engine."""

from pathlib import Path

import torch

_TAG = "state"


def trained_weights(folder: Path, *, zero_stage: int, has_frozen: bool) -> dict[str, torch.Tensor]:
    """Names and tensors of everything that was trained.

    Args:
        folder: a checkpoint's folder, as `DeepSpeedEngine.save` wrote it.
        zero_stage: of the run. Below 3 one file holds the whole model; in stage 3 the ranks' parts of the optimizer's
            float32 weights are put together.
        has_frozen: whether part of the model was frozen, and so is not in the checkpoint.
    """
    if zero_stage < 3:
        path = folder / _TAG / "mp_rank_00_model_states.pt"
        return torch.load(path, map_location="cpu", weights_only=False)["module"]
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=_TAG, exclude_frozen_parameters=has_frozen)
