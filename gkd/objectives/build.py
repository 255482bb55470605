"""From the objective's config to the objective."""

from functools import partial

from gkd import divergences
from gkd.config.objective import (
    CustomDivergence,
    DistillObjective,
    DivergenceConfig,
    GeneralizedJsd,
    SftObjective,
)
from gkd.divergences import Divergence
from gkd.importing import load_object
from gkd.objectives.base import Objective
from gkd.objectives.distill import Distill
from gkd.objectives.sft import SupervisedFineTuning


def build_divergence(config: DivergenceConfig) -> Divergence:
    """The divergence with its options bound.

    Raises:
        UserError: if a custom divergence cannot be imported.
    """
    match config:
        case GeneralizedJsd(beta=beta, normalize=normalize):
            return partial(divergences.generalized_jsd, beta=beta, normalize=normalize)
        case CustomDivergence(path=path, kwargs=kwargs):
            return partial(load_object(path, field="objective.divergence.path"), **kwargs)
        case _:
            return getattr(divergences, config.type)


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
