"""A reward of the student's own responses in a whole run, with a function of the user's in a file."""

import pytest

from gkd.errors import UserError
from gkd.rewards import RewardError

LONG = """
def reward(samples, *, per_token):
    return [per_token * sample.num_tokens for sample in samples]
"""
FAILING = """
def reward(samples):
    if samples[0].source == "student":
        raise LookupError("nothing to be found")
    return [0.0 for _ in samples]
"""


def changes(path, **more):
    return {
        "objective": {
            "type": "rl_gkd",
            "divergence": {"type": "reverse_kl"},
            "alpha": 0.5,
            "baseline": "prompt_mean",
            "normalize_std": True,
        },
        "reward": {"path": f"{path}:reward"} | more,
        "rollout.samples_per_prompt": 4,
    }


@pytest.mark.slow
@pytest.mark.parametrize("max_staleness", [0, 1])
def test_rewards_reach_the_records(train, tmp_path, max_staleness):
    path = tmp_path / "mine.py"
    path.write_text(LONG)
    metrics, samples, folder = train(
        "run", changes(path, kwargs={"per_token": 0.25}) | {"sync.max_staleness": max_staleness}
    )
    assert all(line["reward"] == 0.25 * line["tokens"] for line in samples)
    for line in metrics:
        own = [sample["reward"] for sample in samples if sample["step"] == line["step"]]
        assert line["reward/mean"] == pytest.approx(sum(own) / len(own))
        assert 0 < line["staleness/ess"] <= 1 and line["time/reward_wait_s"] >= 0
        assert line["loss/divergence"] > 0 and "staleness/loss_age_0" in metrics[0]
    assert "reward " in next((folder / "rollouts").iterdir()).read_text()


@pytest.mark.slow
def test_a_reward_function_that_fails_ends_the_run_with_its_traceback(train, tmp_path):
    path = tmp_path / "failing.py"
    path.write_text(FAILING)
    with pytest.raises(
        RewardError, match=r"failing\.py:reward' failed on \d+ samples: LookupError: nothing to be found"
    ):
        train("run", changes(path))


@pytest.mark.slow
def test_a_reward_function_that_is_none_is_refused_before_anything_starts(train, tmp_path):
    path = tmp_path / "none.py"
    path.write_text("def reward(samples):\n    return None\n")
    with pytest.raises(UserError, match=r"reward\.path.*returned None"):
        train("run", changes(path))
