"""Rewards and recorded log-probabilities: who needs them, who is told."""

import pytest
from tiny import config_tree

from gkd.config import parse_config
from gkd.errors import UserError
from launch.objective_needs import check_rewarded, objective_notes, records_logprobs
from launch.placement import needed_places, plan_placement

RL = {"type": "rl_gkd", "divergence": {"type": "reverse_kl"}}
KL = {"type": "distill", "divergence": {"type": "reverse_kl"}}
REWARD = {"path": "reward_functions:lengths"}


CUSTOM = {"type": "custom", "path": "reward_functions:Reinforce", "teacher": False}


def config(tmp_path, *, objective=KL, **changes):
    tree = config_tree(tmp_path / "run", "student", "teacher", str(tmp_path / "train.jsonl"))
    tree["objective"] = objective
    for section, values in changes.items():
        tree[section] = tree.get(section, {}) | values if isinstance(values, dict) else values
    return parse_config(tree)


@pytest.mark.parametrize(
    ("objective", "max_staleness", "asked", "recorded"),
    [
        (KL, 0, "auto", False),
        (KL, 2, "auto", True),
        (KL, 2, False, False),
        (KL, 0, True, True),
        (RL, 0, "auto", True),
        ({"type": "sum", "terms": [{"objective": KL}, {"objective": RL}]}, 0, "auto", True),
    ],
)
def test_when_log_probabilities_are_recorded(tmp_path, objective, max_staleness, asked, recorded):
    given = config(
        tmp_path,
        objective=objective,
        reward=REWARD,
        sync={"max_staleness": max_staleness},
        rollout={"record_logprobs": asked},
    )
    assert records_logprobs(given) is recorded


def test_what_an_objective_needs_cannot_be_turned_off(tmp_path):
    given = config(tmp_path, objective=RL, reward=REWARD, rollout={"record_logprobs": False})
    with pytest.raises(UserError, match=r"rollout\.record_logprobs = False: the rl_gkd objective needs"):
        records_logprobs(given)


def test_an_objective_of_the_users_own_may_need_rewards_too(tmp_path):
    with pytest.raises(UserError, match=r"objective\.type = 'custom': needs rewards"):
        check_rewarded(config(tmp_path, objective=CUSTOM))
    check_rewarded(config(tmp_path, objective=CUSTOM, reward=REWARD))
    check_rewarded(config(tmp_path))
    with pytest.raises(UserError, match=r"reward\.path.*no_such"):
        check_rewarded(config(tmp_path, reward={"path": "reward_functions:no_such"}))


def test_what_is_worth_knowing(tmp_path):
    def notes(**changes):
        return " | ".join(objective_notes(config(tmp_path, **changes)))

    assert notes() == notes(objective=RL, reward=REWARD) == ""
    assert "no use for rewards" in notes(reward=REWARD)
    assert "biased" in notes(objective=RL, reward=REWARD, rollout={"temperature": 0.9})
    assert "biased" in notes(objective=RL, reward=REWARD, rollout={"top_p": 0.9})
    for objective in ({"type": "sampled_kl"}, {"type": "minillm"}, {"type": "moment_matching", "future_credit": "mc"}):
        both = {
            "objective": objective,
            "data": {"on_policy_fraction": 0.5},
        }
        assert notes(**both) == ""
        assert f"{objective['type']} takes samples as drawn at temperature 1 " in notes(**both, rollout={"top_p": 0.9})
        hot = both | {"objective": objective | {"temperature": 2.0}}  # the expectation is at the loss temperature
        assert "as drawn at temperature 2 " in notes(**hot) and notes(**hot, rollout={"temperature": 2.0}) == ""
    for objective in ({"type": "sampled_kl", "estimator": "monte_carlo"}, {"type": "moment_matching"}, KL):
        assert notes(objective=objective, data={"on_policy_fraction": 0.5}, rollout={"temperature": 0.9}) == ""
    two = notes(
        objective={"type": "sum", "terms": [{"objective": RL}, {"objective": {"type": "minillm"}}]},
        reward=REWARD,
        rollout={"temperature": 0.5},
    )
    assert "rl_gkd takes" in two and "minillm takes" in two
    assert "docs/STALENESS.md" in notes(objective=CUSTOM, reward=REWARD, sync={"max_staleness": 2})
    assert notes(objective=RL, reward=REWARD, sync={"max_staleness": 2}) == ""


OWN = {"type": "custom", "path": "custom_objectives:NoTeacher", "teacher": False}


@pytest.mark.parametrize("objective", [{"type": "sampled_kl"}, {"type": "minillm"}, RL, OWN], ids=lambda o: o["type"])
def test_ratios_of_other_distributions_than_the_samplers_are_noted(tmp_path, objective):
    """Also where the loss is at the rollouts' temperature; in synchronous runs there is nothing to correct."""

    def notes(max_staleness, *, objective=objective, **rollout):
        given = config(
            tmp_path,
            objective=objective,
            reward=REWARD,
            data={"on_policy_fraction": 0.5},
            rollout=rollout,
            sync={"max_staleness": max_staleness},
        )
        return [note for note in objective_notes(given) if "ratios" in note]

    warm = objective | {"temperature": 0.7}
    for rollout in ({"temperature": 0.7}, {"temperature": 0.7, "top_p": 0.9}):
        (note,) = notes(2, objective=warm, **rollout)
        assert f"= 2: {objective['type']} weights" in note and "sync.max_staleness to 0 (docs/STALENESS.md)" in note
        assert not notes(0, objective=warm, **rollout)
    (nested,) = notes(1, objective={"type": "sum", "terms": [{"objective": KL}, {"objective": warm}]}, top_p=0.9)
    assert f"{objective['type']} weights" in nested
    assert not notes(2) and not notes(2, objective=warm) and not notes(2, objective=KL, temperature=0.7)


def test_the_reward_function_has_a_place_and_no_gpu(tmp_path):
    given = config(tmp_path, reward=REWARD)
    places = {place.worker: place for place in needed_places(given)}
    assert (places["reward"].num_cpus, places["reward"].num_gpus) == (1, 0)
    assert len(plan_placement(given, 4, 3)) == len(places) == 4
    assert all(place.num_cpus == 0.5 for place in plan_placement(given, 2, 0))
    assert "reward" not in [place.worker for place in needed_places(config(tmp_path))]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"objective": RL}, "rl_gkd objective needs one: add `reward: {path:"),
        (
            {"objective": {"type": "sum", "terms": [{"objective": RL}]}},
            "rl_gkd objective needs one: add `reward: {path:",
        ),
        ({"objective": RL, "reward": REWARD, "data": {"on_policy_fraction": 0.0}}, "data.on_policy_fraction = 0"),
        ({"objective": RL | {"baseline": "prompt_mean"}, "reward": REWARD}, "rollout.samples_per_prompt = 1"),
        ({"objective": RL | {"baseline": "none", "normalize_std": True}, "reward": REWARD}, "True needs a baseline"),
        ({"objective": RL | {"ratio_clip": 0.5}, "reward": REWARD}, "ratio_clip"),
        ({"objective": RL | {"alpha": 1.5}, "reward": REWARD}, "alpha"),
        ({"rollout": {"record_logprobs": "yes please"}}, "record_logprobs"),
        (
            {
                "objective": {"type": "sum", "terms": [{"objective": RL}, {"objective": RL | {"baseline": "none"}}]},
                "reward": REWARD,
            },
            "give them one baseline",
        ),
    ],
)
def test_configs_that_are_refused(tmp_path, changes, problem):
    with pytest.raises(UserError) as caught:
        config(tmp_path, **changes)
    assert problem in str(caught.value)
