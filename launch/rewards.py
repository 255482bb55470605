"""The reward function of a run: its worker, and how work is given to it."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from gkd.advantages import advantages
from gkd.config import Config
from gkd.config.objective import RlGkdObjective, terms_of_type
from launch.preflight import Facts
from launch.ray_session import Workers
from launch.stages import by_step
from rollout.pipeline import NoRewards
from rollout.reward_actor import RewardActor, RewardPool
from rollout.rewards import RewardSettings
from trainer.trainer_actor import Advantages


def start_reward(config: Config, facts: Facts, workers: Workers) -> list[Any]:
    """Start the worker that holds the reward function; none where there is no such function."""
    if config.reward is None:
        return []
    settings = RewardSettings(
        path=config.reward.path,
        kwargs=config.reward.kwargs,
        tokenizer=facts.student.path,
        stop_ids=facts.stop_ids,
    )
    return workers.start_all("reward", RewardActor, settings)


def rewards_of(config: Config, facts: Facts, actors: Sequence[Any]) -> RewardPool | NoRewards:
    """The worker as the pipeline sees it."""
    references = by_step(config, [stage.references for stage in facts.stages])
    return RewardPool(actors[0], references=references) if actors else NoRewards()


def advantages_of(config: Config) -> Advantages | None:
    """From rewards to advantages: as the objective's rl_gkd terms say, which agree, else against the batch's mean."""
    if config.reward is None:
        return None
    for term in terms_of_type(config.objective, RlGkdObjective):
        return partial(advantages, baseline=term.baseline, normalize_std=term.normalize_std)
    return partial(advantages, baseline="batch_mean", normalize_std=False)
