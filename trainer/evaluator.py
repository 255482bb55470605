"""Evaluation while training: the live engines answer held-out prompts, the ranks compare with the teacher, and read
what the held-out data says itself."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gkd.config.divergence import DivergenceConfig
from gkd.evaluation import exact_match
from gkd.interfaces import Answers, Scores, SignalRef
from gkd.scoring import GroupLimits, scoring_groups
from gkd.trace import Lane
from gkd.types import Prompt, Rollout, SampleId

_PROMPTS_PER_CALL = 128
"""Prompts answered at once: between two calls the engines look after the training rollouts."""
_GROUPS_AT_ONCE = 2
"""Scoring groups whose signals are held at once."""
_GIVEN_AT_ONCE = 256
"""Given responses that the ranks are sent at once."""


class Comparer(Protocol):
    """The training ranks, as evaluation sees them."""

    def divergence(
        self,
        rollouts: Sequence[Rollout],
        groups: Sequence[Sequence[SampleId]],
        signals: Sequence[Any],
        config: DivergenceConfig,
        temperature: float,
    ) -> tuple[float, int]:
        """Sum over all response tokens, and their number."""
        ...


class Reader(Protocol):
    """The training ranks, as they read what is given."""

    def negative_log_likelihood(self, rollouts: Sequence[Rollout]) -> tuple[float, int]:
        """Sum over all response tokens in the loss, in nats, and their number."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """What is asked, and what would be right."""

    prompts: tuple[Prompt, ...]
    """Held-out prompts."""
    references: tuple[str | None, ...]
    """The right answer to each, as text; None where the data has none."""


class ExactMatch:
    """`eval/exact_match`: share of greedy answers equal to their reference."""

    def __init__(self, held_out: HeldOut, answers: Answers, decode: Callable[[Sequence[int]], str]) -> None:
        """`decode` turns a response into text, its stop token left out."""
        pairs = zip(held_out.prompts, held_out.references, strict=True)
        known = [(prompt, reference) for prompt, reference in pairs if reference is not None]
        self._prompts = [prompt for prompt, _ in known]
        self._references = [reference for _, reference in known]
        self._answers = answers
        self._decode = decode

    def __call__(self) -> dict[str, float]:
        """Measure."""
        responses = [self._decode(r.response_ids) for r in _answered(self._answers, self._prompts, temperature=0.0)]
        return {"eval/exact_match": exact_match(responses, self._references)}


class Divergence:
    """`eval/divergence`: mean per token to the teacher, on samples that the student writes itself."""

    def __init__(
        self,
        held_out: HeldOut,
        answers: Answers,
        scores: Scores,
        comparer: Comparer,
        *,
        divergence: DivergenceConfig,
        temperature: float,
        loss_temperature: float,
        limits: Mapping[str | None, GroupLimits],
    ) -> None:
        """`temperature` is of the samples, `loss_temperature` of the divergence, `limits` of what a teacher scores."""
        self._prompts = held_out.prompts
        self._answers = answers
        self._scores = scores
        self._comparer = comparer
        self._divergence = divergence
        self._temperature = temperature
        self._loss_temperature = loss_temperature
        self._limits = limits

    def __call__(self) -> dict[str, float]:
        """Measure."""
        rollouts = _answered(self._answers, self._prompts, temperature=self._temperature)
        lengths = [rollout.num_scored_tokens for rollout in rollouts]
        groups = scoring_groups([rollout.teacher for rollout in rollouts], lengths, self._limits)
        total, count = 0.0, 0
        for first in range(0, len(groups), _GROUPS_AT_ONCE):
            some = groups[first : first + _GROUPS_AT_ONCE]
            members = [[rollouts[i] for i in group] for group in some]
            part, tokens = self._comparer.divergence(
                [rollout for group in members for rollout in group],
                [[rollout.id for rollout in group] for group in members],
                self._scores.score_now(members),
                self._divergence,
                self._loss_temperature,
            )
            total, count = total + part, count + tokens
        return {"eval/divergence": total / count}


class CrossEntropy:
    """`eval/cross_entropy`: mean negative log-likelihood of given responses, in nats per token."""

    def __init__(self, given: Sequence[Rollout], reader: Reader) -> None:
        """`given` are the held-out data's own responses."""
        self._given = given
        self._reader = reader

    def __call__(self) -> dict[str, float]:
        """Measure."""
        total, count = 0.0, 0
        for first in range(0, len(self._given), _GIVEN_AT_ONCE):
            part, tokens = self._reader.negative_log_likelihood(self._given[first : first + _GIVEN_AT_ONCE])
            total, count = total + part, count + tokens
        return {"eval/cross_entropy": total / count}


class Evaluator:
    """Measures at every so many steps, and at the last one."""

    def __init__(
        self, measures: Sequence[Callable[[], dict[str, float]]], due: Callable[[int], bool], lane: Lane
    ) -> None:
        """`due` says after which steps; `lane` is that of the training loop, which waits."""
        self._measures = measures
        self._due = due
        self._lane = lane

    def __call__(self, step: int) -> dict[str, float]:
        """The `eval/` metrics after a step; nothing where none are due."""
        if not self._due(step):
            return {}
        results: dict[str, float] = {}
        with self._lane.span("evaluate", step=step) as evaluating:
            for measure in self._measures:
                results |= measure()
        return results | {"time/eval_s": evaluating.seconds}


class NoScores:
    """In the teachers' place where the ranks make the teacher's signal themselves."""

    def score_now(self, groups: Sequence[Sequence[Rollout]]) -> list[SignalRef | None]:
        """Nothing for each group."""
        return [None] * len(groups)


def _answered(answers: Answers, prompts: Sequence[Prompt], *, temperature: float) -> list[Rollout]:
    rollouts: list[Rollout] = []
    for first in range(0, len(prompts), _PROMPTS_PER_CALL):
        rollouts += answers.answer(prompts[first : first + _PROMPTS_PER_CALL], temperature=temperature)
    return rollouts
