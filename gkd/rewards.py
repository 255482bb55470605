"""Rewards: what a function of the user's own says of whole responses, as text.

`reward: {path: "my_file.py:my_reward", kwargs: {...}}` names one:

    def my_reward(samples: Sequence[RewardSample], **kwargs) -> Sequence[float]

It is called with a few samples at a time, in a process of its own, and returns one finite number for each.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from gkd.importing import load_object
from gkd.types import Source, StopReason


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSample:
    """What a reward function sees of one sample."""

    prompt: str
    """What was answered, as the model read it: a chat template's special tokens included."""
    response: str
    """The answer without the stop token at its end."""
    reference: str | None
    """The record's final answer; None where the record has none."""
    source: Source
    """Who wrote the response."""
    stop_reason: StopReason
    """Why it ends; "length" where it was cut."""
    num_tokens: int
    """Length of the response, a stop token included."""


RewardFunction = Callable[[Sequence[RewardSample]], Sequence[float]]
"""One finite number per sample, in order."""


class RewardError(RuntimeError):
    """A reward function failed, or returned what is no reward."""


def load_reward(path: str, kwargs: dict[str, Any]) -> RewardFunction:
    """The function that an import path names, with its keyword arguments bound.

    Raises:
        UserError: if it cannot be imported.
    """
    return partial(load_object(path, field="reward.path"), **kwargs)


def call_reward(reward: RewardFunction, samples: Sequence[RewardSample], *, name: str) -> list[float]:
    """The rewards of some samples.

    Args:
        reward: the function.
        samples: at least one.
        name: of the function, for the error message.

    Raises:
        RewardError: if it fails, or does not return one finite number per sample.
    """
    try:
        returned = reward(samples)
    except Exception as error:  # the user's own function may fail in any way
        raise RewardError(f"{name} failed on {len(samples)} samples: {type(error).__name__}: {error}") from error
    try:
        values = [float(value) for value in returned]
    except (TypeError, ValueError) as error:
        raise RewardError(f"{name} returned {_shown(returned)}, which is no sequence of numbers") from error
    if len(values) != len(samples):
        raise RewardError(f"{name} returned {len(values)} rewards for {len(samples)} samples")
    for sample, value in zip(samples, values, strict=True):
        if not math.isfinite(value):
            raise RewardError(f"{name} returned {value} for the response {_shown(sample.response)}")
    return values


def exact_match(samples: Sequence[RewardSample]) -> list[float]:
    """1.0 where the response is the reference, but for white space around them; else 0.0.

    Raises:
        ValueError: if a sample has no reference.
    """
    return [float(sample.response.strip() == _reference(sample).strip()) for sample in samples]


def _reference(sample: RewardSample) -> str:
    if sample.reference is None:
        raise ValueError(f"the record of the prompt {_shown(sample.prompt)} has no answer to compare with")
    return sample.reference


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
