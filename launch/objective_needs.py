"""What an objective needs of a run beside a teacher, and what is worth knowing of it."""

from gkd.config import Config
from gkd.config.objective import (
    BuiltObjective,
    MiniLlmObjective,
    MomentMatchingObjective,
    RlGkdObjective,
    SampledKlObjective,
    SumObjective,
    terms_of_type,
)
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
    for name, temperature in _take_tokens_as_actions(config.objective):
        if (rollout.temperature, rollout.top_p) != (temperature, 1):
            found.append(
                f"rollout.temperature = {rollout.temperature:g}, rollout.top_p = {rollout.top_p:g}: {name} takes "
                f"samples as drawn at temperature {temperature:g} and top_p 1; with others its gradient is biased"
            )
    if config.sync.max_staleness > 0 and (rollout.temperature, rollout.top_p) != (1, 1):
        found += [
            f"rollout.temperature = {rollout.temperature:g}, rollout.top_p = {rollout.top_p:g}, sync.max_staleness = "
            f"{config.sync.max_staleness}: {name} weights the tokens of older students by ratios of probabilities at "
            "temperature 1 and top_p 1, which are not those that the tokens were drawn with: its gradient is biased by "
            "their age; set the first two to 1, or sync.max_staleness to 0 (docs/STALENESS.md)"
            for name in _corrected(config.objective)
        ]
    if config.sync.max_staleness > 0 and objective.staleness == "sensitive":
        found.append(
            f"sync.max_staleness = {config.sync.max_staleness}: the {config.objective.type} objective takes older "
            "samples as if the current student had written them: watch the staleness/ metrics (docs/STALENESS.md)"
        )
    return found


def _take_tokens_as_actions(objective: BuiltObjective) -> list[tuple[str, float]]:
    """What of an objective has an expectation over the student's tokens in its gradient, and at which temperature: the
    loss's, but for a reward, which is of the text that the student writes at temperature 1."""
    policies: list[SampledKlObjective | MiniLlmObjective | MomentMatchingObjective] = [
        *(own for own in terms_of_type(objective, SampledKlObjective) if own.estimator == "policy_gradient"),
        *terms_of_type(objective, MiniLlmObjective),
        *(
            own
            for own in terms_of_type(objective, MomentMatchingObjective)
            if own.future_credit == "mc" and own.learns_from_student
        ),
    ]
    found: list[tuple[str, float]] = [(own.type, 1.0) for own in terms_of_type(objective, RlGkdObjective)]
    found += [(own.type, own.temperature) for own in policies]
    return list(dict.fromkeys(found))


def _corrected(objective: BuiltObjective) -> list[str]:
    """What of an objective weights tokens by importance ratios: itself, or terms of a sum."""
    if isinstance(objective, SumObjective):
        return list(dict.fromkeys(name for term in objective.terms for name in _corrected(term.objective)))
    return [objective.type] if build_objective(objective).staleness == "corrected" else []


def _objective(config: Config) -> Objective:
    return build_objective(config.objective)


def _needs_reward(objective: object) -> bool:
    """Whether the objective, or a term of it, does."""
    own = bool(getattr(objective, "needs_reward", False))
    return own or any(_needs_reward(term) for term in getattr(objective, "terms", ()))
