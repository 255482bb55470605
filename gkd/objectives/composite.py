"""Objectives made of objectives: sums of them, and tokens weighted by something else than their place in the mean.

Legend: T packed response tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch

from gkd.errors import UserError
from gkd.objectives.base import (
    Adversary,
    Objective,
    ObjectiveInputs,
    ObjectiveOutput,
    Staleness,
    adversaries_of,
)
from gkd.signals import SPARSE, SignalKind

_BY_SENSITIVITY: tuple[Staleness, ...] = ("robust", "corrected", "sensitive")


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One objective of a sum."""

    name: str
    """What its metrics begin with."""
    objective: Objective
    """The loss."""
    weight: float
    """Multiplies it, as it is."""
    only: Literal["student", "dataset"] | None
    """Whose text it is of; None for both."""
    temperature: float
    """Its loss temperature."""


class Sum:
    """sum_i weight_i loss_i, per token.

    A term that counts fewer tokens than there are (`sampled_kl` counts the student's alone) adds 0 at the others, and
    the sum is averaged over all valid tokens. So a term is *not* averaged over its own tokens: on a share lambda of the
    batch it weighs lambda times its weight, as in GKD's objective, where data of either source count by their number
    (arXiv 2306.13649). Each term's metrics are averaged over its own tokens, and so is its loss, `<term>_loss`.

    Each term makes the student's logits for itself: with n terms the output head is applied n times.
    """

    def __init__(self, terms: Sequence[Term], *, field: str) -> None:
        """`field` is the config field of the sum, for messages.

        Raises:
            UserError: if no signal of the teacher serves all terms.
        """
        self.terms = tuple(term.objective for term in terms)
        self.adversaries = tuple(adversary for term in terms for adversary in _of_its_text(term))
        self.requires = _common_requirement(terms, field)
        self.staleness: Staleness = max((term.staleness for term in self.terms), key=_BY_SENSITIVITY.index)
        self.needs_sampler_logprobs = any(term.needs_sampler_logprobs for term in self.terms)
        self._terms = tuple(terms)

    def __call__(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        """The weighted sum per token [T].

        Raises:
            ValueError: as the terms.
        """
        loss_T = torch.zeros(len(inputs.mask_T), device=inputs.mask_T.device)
        metrics: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for term in self._terms:
            chosen_T = _chosen(inputs, term.only)
            output = term.objective(_reweighted(inputs, chosen_T * term.weight))
            own_T = output.mask_T & inputs.mask_T & chosen_T
            # Selected and not multiplied: what a term says of tokens that it does not count may be infinite.
            loss_T = loss_T + term.weight * torch.where(own_T, output.loss_T, torch.zeros_like(output.loss_T))
            measured = {name: (values_T, output.mask_T) for name, values_T in output.metrics_T.items()}
            measured |= output.partial_metrics_T | {"loss": (output.loss_T.detach(), own_T)}
            metrics |= {f"{term.name}_{name}": (values, mask & own_T) for name, (values, mask) in measured.items()}
        return ObjectiveOutput(loss_T=loss_T, mask_T=inputs.mask_T, partial_metrics_T=metrics)


def term_names(types: Sequence[str]) -> list[str]:
    """What the metrics of each term begin with: its type, with a number where the type is there more than once."""
    return [
        kind if types.count(kind) == 1 else f"{kind}_{types[: place + 1].count(kind)}"
        for place, kind in enumerate(types)
    ]


def _of_its_text(term: Term) -> list[Adversary]:
    """A term's adversaries; they learn on the text that the term is of."""
    own = adversaries_of(term.objective)
    return own if term.only is None else [WeightedAdversary(adversary, _Only(term.only)) for adversary in own]


def _reweighted(inputs: ObjectiveInputs, factors_T: torch.Tensor) -> ObjectiveInputs:
    """The inputs of a loss that is going to be multiplied by some factors [T]."""
    if inputs.loss_weights_T is None:
        return inputs
    return replace(inputs, loss_weights_T=inputs.loss_weights_T * factors_T)


def _chosen(inputs: ObjectiveInputs, only: Literal["student", "dataset"] | None) -> torch.Tensor:
    if only is None:
        return torch.ones_like(inputs.mask_T)
    return inputs.on_policy_T if only == "student" else ~inputs.on_policy_T


def _common_requirement(terms: Sequence[Term], field: str) -> frozenset[SignalKind]:
    """Signals that serve every term that compares with a teacher."""
    asking = [term for term in terms if term.objective.requires]
    if not asking:
        return frozenset()
    common = frozenset.intersection(*(term.objective.requires for term in asking))
    if not common:
        one, other = _disagreeing(asking)
        raise UserError(
            field,
            f"{one.name} + {other.name}",
            f"cannot share a teacher signal: {one.name} requires {_listed(one.objective.requires)}, and {other.name} "
            f"{_listed(other.objective.requires)}.",
            "Leave one of them out.",
        )
    if len({term.temperature for term in asking}) == 1:
        return common
    if common <= SPARSE:
        one, other = next((asking[0], term) for term in asking if term.temperature != asking[0].temperature)
        raise UserError(
            field,
            f"{one.name} + {other.name}",
            f"are at the temperatures {one.temperature:g} and {other.temperature:g}, and the signal that serves both "
            f"({_listed(common)}) is made at one.",
            "Give both the same temperature.",
        )
    return common - SPARSE


def _disagreeing(terms: Sequence[Term]) -> tuple[Term, Term]:
    """Two that share no signal; if every two share one, and only all together none, the first and the last."""
    pairs = ((one, other) for place, one in enumerate(terms) for other in terms[place + 1 :])
    disjoint = (pair for pair in pairs if not pair[0].objective.requires & pair[1].objective.requires)
    return next(disjoint, (terms[0], terms[-1]))


def _listed(kinds: frozenset[SignalKind]) -> str:
    return " or ".join(sorted(kinds))


class TokenWeight(Protocol):
    """How much each token counts."""

    requires: frozenset[SignalKind]
    """Signal kinds, one of which it needs; empty if it looks at no teacher."""

    def __call__(self, inputs: ObjectiveInputs) -> torch.Tensor:
        """[T] weights, without a graph."""
        ...


@dataclass(slots=True)
class _Only:
    """1 where a token is of one side's text, else 0."""

    side: Literal["student", "dataset"]
    requires: frozenset[SignalKind] = frozenset()

    def __call__(self, inputs: ObjectiveInputs) -> torch.Tensor:
        return _chosen(inputs, self.side).float()


class WeightedTokens:
    """Any objective, its loss multiplied by a weight per token; the objective does not know of it.

    Weights are used as they are, and the mean is still over the number of tokens: weights with the mean 1/2 halve the
    loss. Dividing by their sum would tie the micro-batches to each other. Their mean is the metric `token_weight`. A
    weight of 0 takes a token's gradient away, but the token still counts in the mean. What the objective owns learns
    with the same weights: critics and student play for one value.
    """

    def __init__(self, objective: Objective, weight: TokenWeight, *, field: str) -> None:
        """`field` is the config field of the objective, for messages.

        Raises:
            UserError: if no signal of the teacher serves both.
        """
        needs = objective.requires, weight.requires
        self.requires = needs[0] & needs[1] if all(needs) else needs[0] | needs[1]
        if any(needs) and not self.requires:
            raise UserError(
                f"{field}.token_weight",
                type(weight).__name__,
                f"requires {_listed(needs[1])} of the teacher, and the objective {_listed(needs[0])}.",
                "Use another token weight.",
            )
        self.terms = (objective,)
        self.adversaries = tuple(WeightedAdversary(adversary, weight) for adversary in adversaries_of(objective))
        self.staleness = objective.staleness
        self.needs_sampler_logprobs = objective.needs_sampler_logprobs
        self._objective = objective
        self._weight = weight

    def __call__(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        """The weighted loss per token [T].

        Raises:
            ValueError: as the objective, or if the teacher's signal is not what the weight needs.
        """
        weight_T = _weight_of(self._weight, inputs)
        output = _weighted(self._objective(_reweighted(inputs, weight_T)), weight_T)
        return replace(output, metrics_T=output.metrics_T | {"token_weight": weight_T})


class WeightedAdversary:
    """An adversary whose loss is multiplied by the weights that the student's is; all else is its own."""

    def __init__(self, adversary: Adversary, weight: TokenWeight) -> None:
        self.learning_rate_multiplier = adversary.learning_rate_multiplier
        self.weight_decay = adversary.weight_decay
        self.grad_clip = adversary.grad_clip
        self._adversary = adversary
        self._weight = weight

    def prepare(self, inputs: ObjectiveInputs, *, seed: int) -> None:
        """Make the adversary's parameters."""
        self._adversary.prepare(inputs, seed=seed)

    def parameters(self) -> list[torch.nn.Parameter]:
        """The adversary's."""
        return self._adversary.parameters()

    def loss(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        """The weighted loss per token; its metrics have no weights but the reducer's."""
        weight_T = _weight_of(self._weight, inputs)
        return _weighted(self._adversary.loss(_reweighted(inputs, weight_T)), weight_T)

    def inner_steps(self, step: int) -> int:
        """The adversary's."""
        return self._adversary.inner_steps(step)

    def end_step(self, metrics: Mapping[str, float]) -> None:
        """Tell the adversary."""
        self._adversary.end_step(metrics)

    def state_dict(self) -> dict[str, Any]:
        """The adversary's: weights have no state."""
        return self._adversary.state_dict()

    def load_state_dict(self, state: Mapping[str, Any], *, device: torch.device) -> None:
        """Go on from what `state_dict` gave."""
        self._adversary.load_state_dict(state, device=device)


@torch.no_grad()
def _weight_of(weight: TokenWeight, inputs: ObjectiveInputs) -> torch.Tensor:
    return weight(inputs).detach()


def _weighted(output: ObjectiveOutput, weight_T: torch.Tensor) -> ObjectiveOutput:
    # Selected and not multiplied: what weighs nothing may be infinite.
    loss_T = torch.where(weight_T == 0, torch.zeros_like(output.loss_T), output.loss_T * weight_T)
    return replace(output, loss_T=loss_T)
