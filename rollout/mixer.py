"""Which samples of a step the student writes itself, and how they are grouped for scoring.

A step's plan is a pure function of the seed, the step and the data: nothing about it depends on what finishes when.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from gkd.scoring import GroupLimits, scoring_groups
from gkd.seeds import generator
from gkd.types import Prompt, Rollout, SampleId
from rollout.prompts import PromptStream


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one optimizer step trains on, before anything is generated."""

    step: int
    """The optimizer step, from 1."""
    samples: tuple[SampleId, ...]
    """Every sample, in the order of the batch."""
    on_policy: tuple[Prompt, ...]
    """Prompts that an engine answers: the student's, or the teacher's where that one writes all responses."""
    off_policy: tuple[Rollout, ...]
    """Samples whose response is the dataset's."""
    groups: tuple[tuple[SampleId, ...], ...]
    """Scoring groups: each is scored by one teacher, or by all of a mixture, in one batch as soon as all its members
    are there. Every sample is in one."""
    stage: int = 0
    """The stage that the step is in, from 0."""


class Mixer:
    """Plans the steps: on-policy with probability lambda (GKD, arXiv 2306.13649, Algorithm 1)."""

    def __init__(
        self,
        stream: PromptStream,
        *,
        seed: int,
        batch_size: int,
        on_policy_fraction: float,
        mixing: Literal["per_step", "per_sample"],
        max_new_tokens: int,
        limits: Mapping[str | None, GroupLimits],
    ) -> None:
        """Args are the config's; `limits` of each teacher's scoring groups, counted with the longest responses."""
        self._stream = stream
        self._seed = seed
        self._batch_size = batch_size
        self._on_policy_fraction = on_policy_fraction
        self._mixing = mixing
        self._max_new_tokens = max_new_tokens
        self._limits = limits

    def plan(self, step: int) -> StepPlan:
        """The plan of optimizer step `step`, from 1."""
        first = (step - 1) * self._batch_size
        prompts = [self._stream.sample(first + i) for i in range(self._batch_size)]
        mask = self._draw(step)
        on_policy = tuple(prompt for prompt, student in zip(prompts, mask, strict=True) if student)
        off_policy = tuple(from_dataset(prompt) for prompt, student in zip(prompts, mask, strict=True) if not student)
        return StepPlan(
            step=step,
            samples=tuple(prompt.id for prompt in prompts),
            on_policy=on_policy,
            off_policy=off_policy,
            groups=self._group(prompts, mask),
        )

    def _draw(self, step: int) -> list[bool]:
        random = generator(self._seed, "mixing", step)
        if self._mixing == "per_step":
            return [bool(random.random() < self._on_policy_fraction)] * self._batch_size
        return (random.random(self._batch_size) < self._on_policy_fraction).tolist()

    def _group(self, prompts: Sequence[Prompt], mask: Sequence[bool]) -> tuple[tuple[SampleId, ...], ...]:
        """Groups by what is known before generation, off-policy samples apart: they need not wait for the engine."""
        groups: list[tuple[SampleId, ...]] = []
        for student in (False, True):
            members = [prompt for prompt, is_student in zip(prompts, mask, strict=True) if is_student == student]
            lengths = [
                len(p.scored_prompt_ids) + self._max_new_tokens if student else from_dataset(p).num_scored_tokens
                for p in members
            ]
            for group in scoring_groups([prompt.teacher for prompt in members], lengths, self._limits):
                groups.append(tuple(members[i].id for i in group))
        return tuple(groups)


def from_dataset(prompt: Prompt) -> Rollout:
    """The dataset's completion as a response, to the prompt that it answers."""
    completion = prompt.completion
    assert completion is not None, "records without completion are refused before training"
    return Rollout(
        id=prompt.id,
        prompt_ids=completion.prompt_ids,
        response_ids=completion.response_ids,
        stop_reason="dataset",
        source="dataset",
        versions=None,
        loss_mask=completion.loss_mask,
        teacher=prompt.teacher,
        teacher_prompt_ids=prompt.teacher_prompt_ids,
    )
