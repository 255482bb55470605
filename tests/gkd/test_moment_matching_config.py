"""Moment matching as a section of a run's config."""

import pytest

from gkd.config import parse_config
from gkd.errors import UserError

CONFIG = {
    "run": {"name": "tiny", "output_dir": "outputs/tiny"},
    "student": {"model": "student"},
    "teacher": {"model": "teacher"},
    "data": {"train": {"path": "train.jsonl"}, "on_policy_fraction": 0.5},
    "trainer": {"max_steps": 4, "batch_size": 8, "learning_rate": 0.001},
}


def config_of(fraction=0.5, **objective):
    return parse_config(
        CONFIG
        | {
            "data": CONFIG["data"] | {"on_policy_fraction": fraction},
            "objective": {"type": "moment_matching"} | objective,
        }
    )


def test_the_defaults_are_those_of_the_method():
    objective = config_of().objective
    assert (objective.off_policy_weight, objective.future_credit, objective.trunk) == (0.5, "none", "teacher")
    assert (objective.inner_steps, objective.warmup_inner_steps, objective.warmup_steps) == (1, 5, 50)
    critic = objective.critic
    assert (critic.bound, critic.rank, critic.init_scale) == (1.0, None, 1e-3)
    assert (critic.weight_decay, critic.grad_clip, critic.lr_multiplier) == (0.01, 1.0, 10.0)
    assert not config_of(off_policy_weight=1).needs_rollouts
    assert config_of(1.0, off_policy_weight=0).needs_rollouts


@pytest.mark.parametrize(
    ("fraction", "objective", "problem"),
    [
        (1.0, {}, "data.on_policy_fraction.*off_policy_weight to 0"),
        (0.0, {}, "data.on_policy_fraction.*off_policy_weight to 1"),
        (0.0, {"off_policy_weight": 0}, "data.on_policy_fraction.*raise the fraction"),
        (0.5, {"off_policy_weight": 1.5}, "objective.off_policy_weight.*less than or equal to 1"),
        (0.5, {"future_credit": "all"}, "objective.future_credit.*mc"),
        (0.5, {"inner_steps": 0}, "objective.inner_steps.*greater than or equal to 1"),
        (0.5, {"critic": {"bound": 0}}, "objective.critic.bound.*greater than 0"),
        (0.5, {"critic": {"ranks": 3}}, "objective.critic.ranks.*rank"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(fraction, objective, problem):
    with pytest.raises(UserError, match=problem):
        config_of(fraction, **objective)
