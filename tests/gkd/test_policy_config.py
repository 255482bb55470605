"""Policy-gradient objectives as sections of a run's config."""

import math

import pytest

from gkd.config import parse_config
from gkd.config.objective import MiniLlmObjective, SampledKlObjective
from gkd.errors import UserError
from gkd.objectives import build_objective
from gkd.objectives.minillm import MiniLlm
from gkd.objectives.monte_carlo_kl import MonteCarloKl
from gkd.objectives.sampled_kl import SampledKl
from gkd.signals import ANY_DISTRIBUTION, ANY_LOGPROBS, WHOLE_DISTRIBUTION


def config(objective, **data):
    return parse_config(
        {
            "run": {"name": "a", "output_dir": "out"},
            "student": {"model": "s"},
            "teacher": {"model": "t"},
            "data": {"train": {"path": "a.jsonl"}} | data,
            "objective": objective,
            "trainer": {"max_steps": 1, "batch_size": 1, "learning_rate": 0.1},
        }
    )


def test_what_is_built_from_the_config():
    built = build_objective(SampledKlObjective(type="sampled_kl", temperature=2, gamma=0.5, ratio_clip=3))
    assert isinstance(built, SampledKl) and built.requires == ANY_LOGPROBS and built.needs_sampler_logprobs
    assert (built.temperature, built.gamma, built.length_normalize, built.ratio_clip) == (2, 0.5, False, 3)
    assert build_objective(SampledKlObjective(type="sampled_kl", ratio_clip=None)).ratio_clip == math.inf
    drawn = build_objective(SampledKlObjective(type="sampled_kl", estimator="monte_carlo", num_draws=7))
    assert isinstance(drawn, MonteCarloKl) and drawn.requires == WHOLE_DISTRIBUTION and drawn.num_draws == 7
    assert (drawn.staleness, built.staleness) == ("robust", "corrected") and not drawn.needs_sampler_logprobs
    mini = build_objective(MiniLlmObjective(type="minillm"))
    assert isinstance(mini, MiniLlm) and mini.requires == ANY_DISTRIBUTION and mini.needs_sampler_logprobs
    assert build_objective(MiniLlmObjective(type="minillm", single_step=False)).requires == ANY_LOGPROBS
    parsed = config({"type": "minillm"}, on_policy_fraction=0.5)
    assert parsed.needs_teacher and parsed.needs_rollouts and parsed.needs_completions
    assert parsed.objective.evaluated_divergence.type == "reverse_kl"


@pytest.mark.parametrize(
    ("objective", "field", "cure"),
    [
        ({"type": "sampled_kl", "num_draws": 2}, "objective", "set estimator"),
        ({"type": "sampled_kl", "estimator": "monte_carlo", "gamma": 0.5}, "objective", "`gamma` is of the estimator"),
        ({"type": "sampled_kl", "estimator": "monte_carlo", "ratio_clip": None}, "objective", "ratio_clip"),
        ({"type": "sampled_kl", "ratio_clip": 0.5}, "objective.ratio_clip", "greater than or equal to 1"),
        ({"type": "sampled_kl", "gamma": 1.5}, "objective.gamma", "less than or equal to 1"),
        ({"type": "minillm", "clip_range": 1.0}, "objective.clip_range", "less than 1"),
        ({"type": "minillm", "cliprange": 0.1}, "objective.cliprange", "clip_range"),
    ],
)
def test_mistakes_name_the_field_and_the_cure(objective, field, cure):
    with pytest.raises(UserError, match=cure) as caught:
        config(objective)
    assert caught.value.field == field


@pytest.mark.parametrize("kind", ["sampled_kl", "minillm"])
def test_what_learns_from_the_students_tokens_alone_needs_some(kind):
    with pytest.raises(UserError, match="raise the fraction") as caught:
        config({"type": kind}, on_policy_fraction=0)
    assert caught.value.field == "data.on_policy_fraction"
    assert config({"type": "sampled_kl", "estimator": "monte_carlo"}, on_policy_fraction=0).needs_teacher
