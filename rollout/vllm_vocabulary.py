"""Keeps vLLM to the tokens that exist: heads have rows beyond the tokenizer, and vLLM samples them."""

from typing import Any

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor

SETTING = "gkd_vocabulary"
"""Key of vLLM's `additional_config` that holds the number of ids that may be sampled."""


class KnownTokensOnly(LogitsProcessor):
    """Masks the rows beyond the vocabulary, for the whole batch at once.

    `SamplingParams.allowed_token_ids` would do the same with a list of all ids in every request, which costs tens of
    milliseconds of Python each at a vocabulary of 150,000. Log-probabilities are returned as the model gave them.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._vocabulary: int = vllm_config.additional_config[SETTING]

    def is_argmax_invariant(self) -> bool:
        """A masked row could be the largest."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """The mask is the same for every request."""

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Mask [sequences, rows] logits in place."""
        logits[:, self._vocabulary :] = float("-inf")
        return logits
