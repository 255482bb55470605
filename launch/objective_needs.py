"""What an objective needs of a run beside a teacher, and what is worth knowing of it."""

from gkd.config import Config
from gkd.config.objective import RlGkdObjective, terms_of_type
from gkd.errors import UserError
from gkd.objectives import build_objective
from gkd.objectives.base import Objective
from gkd.rewards import load_reward


def check_rewarded(config: Config) -> None:
    """There is a reward function where the objective needs one, and it can be imported.

    Raises:
        UserError: if not.
    """
    if config.reward is not None:
        load_reward(config.reward.path, config.reward.kwargs)
    elif _needs_reward(_objective(config)):
        raise UserError(
            "objective.type",
            config.objective.type,
            "needs rewards, and there is no reward function.",
            'Add `reward: {path: "my_file.py:my_reward"}`.',
        )


def records_logprobs(config: Config) -> bool:
    """Whether the rollout engines record the sampled tokens' log-probabilities: `rollout.record_logprobs`, resolved.

    Raises:
        UserError: if it is off, and the objective needs them.
    """
    asked, needed = config.rollout.record_logprobs, _objective(config).needs_sampler_logprobs
    if asked is False and needed:
        raise UserError(
            "rollout.record_logprobs",
            False,
            f"the {config.objective.type} objective needs the log-probabilities of the sampled tokens.",
            "Leave it at auto.",
        )
    return needed or (config.sync.max_staleness > 0 if asked == "auto" else asked)


def objective_notes(config: Config) -> list[str]:
    """What is allowed and yet worth knowing."""
    objective, rollout = _objective(config), config.rollout
    found = []
    if config.reward is not None and not _needs_reward(objective):
        found.append(f"the {config.objective.type} objective has no use for rewards: they are only recorded")
    if terms_of_type(config.objective, RlGkdObjective) and (rollout.temperature, rollout.top_p) != (1, 1):
        found.append(
            f"rollout.temperature = {rollout.temperature:g}, rollout.top_p = {rollout.top_p:g}: rl_gkd takes samples "
            "as drawn at temperature 1 and top_p 1; with others the reward's gradient is biased"
        )
    if config.sync.max_staleness > 0 and objective.staleness == "sensitive":
        found.append(
            f"sync.max_staleness = {config.sync.max_staleness}: the {config.objective.type} objective takes older "
            "samples as if the current student had written them: watch the staleness/ metrics (docs/STALENESS.md)"
        )
    return found


def _objective(config: Config) -> Objective:
    return build_objective(config.objective)


def _needs_reward(objective: object) -> bool:
    """Whether the objective, or a term of it, does."""
    own = bool(getattr(objective, "needs_reward", False))
    return own or any(_needs_reward(term) for term in getattr(objective, "terms", ()))
