"""From the objective's config to the objective."""

from functools import partial
from typing import Any

import torch

from gkd import divergences
from gkd.config.objective import (
    CustomDivergence,
    DistillObjective,
    DivergenceConfig,
    GeneralizedJsd,
    SftObjective,
)
from gkd.divergences import Divergence
from gkd.errors import UserError
from gkd.importing import load_object
from gkd.objectives.base import Objective
from gkd.objectives.distill import Distill
from gkd.objectives.sft import SupervisedFineTuning


def build_divergence(config: DivergenceConfig) -> Divergence:
    """The divergence with its options bound.

    Raises:
        UserError: if a custom divergence cannot be imported, or is no divergence.
    """
    match config:
        case GeneralizedJsd(beta=beta, normalize=normalize):
            return partial(divergences.generalized_jsd, beta=beta, normalize=normalize)
        case CustomDivergence(path=path, kwargs=kwargs):
            return _checked(load_object(path, field="objective.divergence.path"), path, kwargs)
        case _:
            return getattr(divergences, config.type)


def _checked(function: Any, path: str, kwargs: dict[str, Any]) -> Divergence:
    """A user's function with its options bound, once it was seen to give one value per token."""
    field, num_tokens = "objective.divergence.path", 3
    try:
        divergence = partial(function, **kwargs)
        loss = divergence(torch.zeros(num_tokens, 5), torch.ones(num_tokens, 5))
    except Exception as error:  # the user's own function may fail in any way
        raise UserError(
            field,
            path,
            f"fails when called with two [tokens, vocabulary] tensors and {kwargs}: {type(error).__name__}: {error}.",
            "It must take (student_logits_TV, teacher_logits_TV, **kwargs).",
        ) from error
    shape = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
    if shape != (num_tokens,):
        raise UserError(
            field, path, f"returned {shape} for {num_tokens} tokens.", "Return one loss per token; gkd averages them."
        )
    return divergence


def build_objective(config: DistillObjective | SftObjective) -> Objective:
    """The objective that the config describes.

    Raises:
        UserError: if a plug-in cannot be imported.
    """
    match config:
        case DistillObjective(divergence=divergence, temperature=temperature):
            return Distill(divergence=build_divergence(divergence), temperature=temperature)
        case SftObjective(temperature=temperature):
            return SupervisedFineTuning(temperature=temperature)
