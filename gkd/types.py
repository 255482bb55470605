"""The contract of each hop: Prompt -> Rollout -> ScoredRollout -> (packed) micro-batch.

Token ids travel as they were sampled, never as text to be tokenised again. Legend: T response tokens of one sequence,
V shared vocabulary rows.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from gkd.signals import TeacherSignal

Source = Literal["student", "dataset", "teacher"]
"""Who wrote a response: the student (on-policy), or the dataset or the teacher (off-policy)."""

StopReason = Literal["stop", "length", "dataset"]
"""Why a response ends: a stop token was sampled; the length limit cut it; the dataset's record ends there."""


@dataclass(frozen=True, slots=True, order=True)
class SampleId:
    """The identity of one sample: every piece of work is named by it and can be done again."""

    epoch: int
    """Passes over the training data completed before this sample, from 0."""
    prompt_index: int
    """Index of the record in the training data as loaded, before any shuffling."""
    sample_index: int
    """Which of the prompt's samples, 0 <= sample_index < samples_per_prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What the dataset answers to a prompt: the off-policy form of a sample."""

    prompt_ids: tuple[int, ...]
    """What it answers to, at least one token. Of a conversation with several assistant turns this is what precedes the
    first of them, where the student's own prompt is what precedes the last."""
    response_ids: tuple[int, ...]
    """The T response tokens, a stop token at the end of every turn included."""
    loss_mask: tuple[bool, ...] | None = None
    """T flags: which tokens the assistant wrote; None: all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt ready for generation."""

    id: SampleId
    """Identity of the sample that this prompt will become."""
    token_ids: tuple[int, ...]
    """The prompt's tokens, at least one."""
    completion: Completion | None = None
    """The dataset's completion, where the record has one."""
    teacher: str | None = None
    """Name of the teacher that scores it, where every record has one of its own; None: all teachers do."""
    teacher_prompt_ids: tuple[int, ...] | None = None
    """What the teacher reads in the prompt's place, at least one token; None: the prompt."""

    @property
    def scored_prompt_ids(self) -> tuple[int, ...]:
        """What the teacher reads before the response."""
        return self.token_ids if self.teacher_prompt_ids is None else self.teacher_prompt_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """A prompt with its response, exactly as the source emitted it."""

    id: SampleId
    """Identity of the sample."""
    prompt_ids: tuple[int, ...]
    """The prompt's tokens. Never in the loss."""
    response_ids: tuple[int, ...]
    """The T response tokens; ends in a stop token only if one was emitted."""
    stop_reason: StopReason
    """Why the response ends."""
    source: Source
    """Who wrote it."""
    versions: tuple[int, int] | None
    """(min, max) weight version (completed optimizer steps) of the student that wrote it; None for any other text."""
    logprobs: tuple[float, ...] | None = None
    """T log-probabilities of the sampled tokens under the raw sampler distribution, in nats, where asked for."""
    top_ids: np.ndarray | None = field(default=None, compare=False)
    """[T, M] int32, the tokens that the student thought most probable when it sampled, -1 where there are fewer; None
    where they were not asked for. They are scored by a teacher that sends a sparse signal."""
    num_cached_tokens: int = 0
    """Prompt tokens whose keys and values the engine had already, from another sample with the same prefix."""
    loss_mask: tuple[bool, ...] | None = None
    """T flags: which response tokens count in the loss; None: all of them. False for what others said between the
    assistant's turns of a dataset's conversation."""
    teacher: str | None = None
    """Name of the teacher that scores it, where every record has one of its own; None: all teachers do."""
    teacher_prompt_ids: tuple[int, ...] | None = None
    """What the teacher reads in the prompt's place, at least one token; None: the prompt. The response is the same, so
    its signal has a row for each of the same T tokens."""

    @property
    def scored_prompt_ids(self) -> tuple[int, ...]:
        """What the teacher reads before the response."""
        return self.prompt_ids if self.teacher_prompt_ids is None else self.teacher_prompt_ids

    @property
    def num_scored_tokens(self) -> int:
        """Tokens that the teacher reads."""
        return len(self.scored_prompt_ids) + len(self.response_ids)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Prompt and response in one sequence."""
        return self.prompt_ids + self.response_ids

    @property
    def num_loss_tokens(self) -> int:
        """Response tokens that count in the loss."""
        return len(self.response_ids) if self.loss_mask is None else sum(self.loss_mask)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRollout:
    """A rollout with what the teacher says of its response."""

    rollout: Rollout
    """The scored sequence."""
    signal: TeacherSignal | None
    """The teacher's signal, one row per response token; None where the objective needs no teacher."""
    reward: float | None = None
    """What the reward function says of the response; None where there is no such function."""
    advantage: float | None = None
    """Reward minus baseline (`gkd.advantages`), 0 for the dataset's samples; None where there is no reward."""
