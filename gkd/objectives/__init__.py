"""Objectives: they declare the teacher signal they require and return per-token losses."""

from gkd.objectives.base import Objective, ObjectiveInputs, ObjectiveOutput
from gkd.objectives.build import build_divergence, build_objective
from gkd.objectives.distill import Distill
from gkd.objectives.sft import SupervisedFineTuning

__all__ = [
    "Distill",
    "Objective",
    "ObjectiveInputs",
    "ObjectiveOutput",
    "SupervisedFineTuning",
    "build_divergence",
    "build_objective",
]
