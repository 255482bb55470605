"""From the objective's config to the objective."""

from functools import partial
from typing import Any

import torch

from gkd import divergences
from gkd.config import token_weight as weights
from gkd.config.divergence import (
    AdaptiveKl,
    CustomDivergence,
    DivergenceConfig,
    GeneralizedJsd,
    SkewForwardKl,
    SkewReverseKl,
)
from gkd.config.objective import (
    BuiltObjective,
    CustomObjective,
    DistillObjective,
    MiniLlmObjective,
    MomentMatchingObjective,
    RlGkdObjective,
    SampledKlObjective,
    SeqKdObjective,
    SftObjective,
    SumObjective,
    terms_of_type,
)
from gkd.divergences import Divergence
from gkd.errors import UserError
from gkd.importing import load_object
from gkd.objectives import token_weights
from gkd.objectives.base import Objective
from gkd.objectives.composite import Sum, Term, TokenWeight, WeightedTokens, term_names
from gkd.objectives.critics import CriticSettings
from gkd.objectives.custom import load_objective, load_token_weight
from gkd.objectives.distill import Distill
from gkd.objectives.minillm import MiniLlm
from gkd.objectives.moment_matching import MomentCritics, MomentMatching
from gkd.objectives.monte_carlo_kl import MonteCarloKl
from gkd.objectives.rl_gkd import RlGkd
from gkd.objectives.sampled_kl import SampledKl
from gkd.objectives.sft import SupervisedFineTuning
from gkd.signals import SignalKind


def build_divergence(config: DivergenceConfig, *, field: str = "objective.divergence") -> Divergence:
    """The divergence with its options bound.

    Args:
        config: the divergence's.
        field: where it stands in the run's config, for messages.

    Raises:
        UserError: if a custom divergence cannot be imported, or is no divergence.
    """
    match config:
        case GeneralizedJsd(beta=beta, normalize=normalize):
            return partial(divergences.generalized_jsd, beta=beta, normalize=normalize)
        case SkewForwardKl(alpha=alpha):
            return partial(divergences.skew_forward_kl, alpha=alpha)
        case SkewReverseKl(alpha=alpha):
            return partial(divergences.skew_reverse_kl, alpha=alpha)
        case AdaptiveKl(head_mass=head_mass):
            return partial(divergences.adaptive_kl, head_mass=head_mass)
        case CustomDivergence(path=path, kwargs=kwargs):
            return _checked(load_object(path, field=f"{field}.path"), path, kwargs, field=f"{field}.path")
        case _:
            return getattr(divergences, config.type)


def _checked(function: Any, path: str, kwargs: dict[str, Any], *, field: str) -> Divergence:
    """A user's function with its options bound, once it was seen to give one value per token."""
    num_tokens = 3
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


def build_objective(config: BuiltObjective, *, field: str = "objective") -> Objective:
    """The objective that the config describes, its token weights around it.

    Args:
        config: the objective's.
        field: where it stands in the run's config, for messages.

    Raises:
        UserError: if a plug-in cannot be imported or is none, if no teacher signal serves all parts, or if a token
            weight is around an objective that it does not fit.
    """
    objective = _build(config, field)
    _check_teacher(objective.requires, config.compares, field)
    if config.token_weight is None:
        return objective
    at = f"{field}.token_weight"
    _check_no_future_credit(config, config.token_weight, at)
    weight = build_token_weight(config.token_weight, temperature=config.temperature, field=at)
    _check_teacher(weight.requires, config.token_weight.needs_teacher, at)
    return WeightedTokens(objective, weight, field=field)


def build_token_weight(config: weights.TokenWeightConfig, *, temperature: float, field: str) -> TokenWeight:
    """The weight of each token.

    Args:
        config: the weight's.
        temperature: of the loss.
        field: where it stands in the run's config, for messages.

    Raises:
        UserError: if a custom function cannot be imported, or gives no weights.
    """
    match config:
        case weights.FirstPart(fraction=fraction):
            return token_weights.FirstPart(fraction=fraction)
        case weights.LinearDecay(last=last):
            return token_weights.LinearDecay(last=last)
        case weights.ExponentialDecay(half_life=half_life):
            return token_weights.ExponentialDecay(half_life=half_life)
        case weights.EntropyWeight(of=of, favour=favour):
            return token_weights.Entropy(of=of, favour=favour, temperature=temperature)
        case weights.AdvantageWeight(cap=cap):
            return token_weights.Advantage(cap=cap, temperature=temperature)
        case weights.CustomWeight(path=path, kwargs=kwargs):
            return load_token_weight(path, kwargs, temperature=temperature, field=field)


def _check_teacher(requires: frozenset[SignalKind], declared: bool, field: str) -> None:
    """Only a custom part can differ from what its config says: whether a teacher is started is read from the config."""
    if bool(requires) != declared:
        raise UserError(
            f"{field}.teacher",
            declared,
            f"does not fit the plug-in, whose `requires` is {sorted(requires)}.",
            f"Set it to {str(bool(requires)).lower()}.",
        )


def _check_no_future_credit(config: BuiltObjective, weight: weights.TokenWeightConfig, field: str) -> None:
    """A token's weight multiplies all that it learns, so the weights of later tokens do not reach its future credit:
    critics that learn with weights would be believed where they learnt nothing."""
    for matching in terms_of_type(config, MomentMatchingObjective):
        if matching.future_credit == "mc" and matching.learns_from_student:
            raise UserError(
                field,
                weight.type,
                "weighs each token's own loss, and with `future_credit: mc` a token of moment_matching answers for "
                "all that comes after it, whatever that weighs.",
                "Set future_credit to none, or remove the token weight.",
            )


def _build_sum(config: SumObjective, field: str) -> Sum:
    names = term_names([term.objective.type for term in config.terms])
    terms = [
        Term(
            name=name,
            objective=build_objective(term.objective, field=f"{field}.terms.{place}.objective"),
            weight=term.weight,
            only=term.only,
            temperature=term.objective.temperature,
        )
        for place, (name, term) in enumerate(zip(names, config.terms, strict=True))
    ]
    return Sum(terms, field=f"{field}.terms")


def _build(config: BuiltObjective, field: str) -> Objective:
    divergence_of = partial(build_divergence, field=f"{field}.divergence")
    match config:
        case SumObjective():
            return _build_sum(config, field)
        case CustomObjective(path=path, kwargs=kwargs, temperature=temperature):
            return load_objective(path, kwargs, temperature=temperature, field=field)
        case SampledKlObjective(estimator="monte_carlo"):
            return MonteCarloKl(temperature=config.temperature, num_draws=config.num_draws)
        case SampledKlObjective():
            return SampledKl(
                temperature=config.temperature,
                gamma=config.gamma,
                length_normalize=config.length_normalize,
                ratio_clip=config.ratio_clip,
            )
        case MiniLlmObjective():
            return MiniLlm(
                temperature=config.temperature,
                gamma=config.gamma,
                length_normalize=config.length_normalize,
                single_step=config.single_step,
                clip_range=config.clip_range,
            )
        case DistillObjective(divergence=divergence, temperature=temperature):
            return Distill(divergence=divergence_of(divergence), temperature=temperature)
        case SeqKdObjective(divergence=divergence, temperature=temperature) if divergence is not None:
            return Distill(divergence=divergence_of(divergence), temperature=temperature)
        case SftObjective(temperature=temperature) | SeqKdObjective(temperature=temperature):
            return SupervisedFineTuning(temperature=temperature)
        case RlGkdObjective(divergence=divergence):
            return RlGkd(
                divergence=divergence_of(divergence),
                alpha=config.alpha,
                temperature=config.temperature,
                ratio_clip=config.ratio_clip,
            )
        case MomentMatchingObjective(critic=critic):
            critics = MomentCritics(
                CriticSettings(bound=critic.bound, rank=critic.rank, init_scale=critic.init_scale),
                off_policy_weight=config.off_policy_weight,
                trunk=config.trunk,
                temperature=config.temperature,
                inner_steps=config.inner_steps,
                warmup_inner_steps=config.warmup_inner_steps,
                warmup_steps=config.warmup_steps,
                learning_rate_multiplier=critic.lr_multiplier,
                weight_decay=critic.weight_decay,
                grad_clip=critic.grad_clip,
            )
            return MomentMatching(critics, future_credit=config.future_credit)
