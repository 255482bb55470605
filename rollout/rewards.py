"""From rollouts to what a reward function sees of them, and its rewards."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from gkd.rewards import RewardSample, call_reward, load_reward
from gkd.types import Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSettings:
    """Everything that the reward worker needs to know, from the config and the student."""

    path: str
    """Import path of the function."""
    kwargs: dict[str, Any]
    """Bound to its keyword arguments."""
    tokenizer: str
    """Folder or hub name of the student."""
    stop_ids: tuple[int, ...]
    """Tokens that end a response."""


class RewardScorer:
    """One reward function, fed with text."""

    def __init__(self, settings: RewardSettings) -> None:
        """Load function and tokenizer.

        Raises:
            UserError: if the function cannot be imported.
        """
        from transformers import AutoTokenizer

        self._reward = load_reward(settings.path, settings.kwargs)
        self._name = f"reward.path = {settings.path!r}"
        self._decode: Callable[[Sequence[int]], str] = AutoTokenizer.from_pretrained(settings.tokenizer).decode
        self._stop_ids = frozenset(settings.stop_ids)

    def score(self, rollouts: Sequence[Rollout], references: Sequence[str | None]) -> list[float]:
        """The reward of each rollout; `references` are the final answers of their records.

        Raises:
            RewardError: if the function fails, or does not return one finite number for each.
        """
        samples = [
            to_sample(rollout, reference, self._decode, self._stop_ids)
            for rollout, reference in zip(rollouts, references, strict=True)
        ]
        return call_reward(self._reward, samples, name=self._name)


def to_sample(
    rollout: Rollout, reference: str | None, decode: Callable[[Sequence[int]], str], stop_ids: Collection[int]
) -> RewardSample:
    """A rollout as text. The stop token that ends a response is left out, those between a conversation's turns not."""
    response = rollout.response_ids
    if response and response[-1] in stop_ids:
        response = response[:-1]
    return RewardSample(
        prompt=decode(list(rollout.prompt_ids)),
        response=decode(list(response)),
        reference=reference,
        source=rollout.source,
        stop_reason=rollout.stop_reason,
        num_tokens=len(rollout.response_ids),
    )
