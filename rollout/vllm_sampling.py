"""Which token a vLLM engine takes: only such as exist, each drawn by its request's own seed.

vLLM runs the logits processor of this file in each of its processes. Its own temperature is 0 for every request: it
takes the largest logit, which is made that of the drawn token. Log-probabilities are returned as the model gave them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from rollout.sampling import draw, draw_nucleus, uniforms

VOCABULARY = "gkd_vocabulary"
"""Key of vLLM's `additional_config` that holds the number of ids that may be sampled."""


@dataclass(slots=True)
class _Request:
    """One that is sampled."""

    seed: int
    temperature: float
    top_p: float
    made: list[int]
    """Its tokens so far; vLLM adds to it."""


class SeededSampling(LogitsProcessor):
    """Masks the rows beyond the vocabulary, and draws a token for each request that has a seed."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._vocabulary: int = vllm_config.additional_config[VOCABULARY]
        self._device = device
        self._requests: dict[int, _Request] = {}
        self._order()

    def is_argmax_invariant(self) -> bool:
        """The largest logit is what it decides."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Requests came, went or moved."""
        if process_dict_updates(self._requests, batch_update, _sampled):
            self._order()

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Make the drawn token's logit the largest of its row: [sequences, rows], float32, in place."""
        logits[:, self._vocabulary :] = float("-inf")
        if not self._requests:
            return logits
        places = [len(request.made) for request in self._sampled]
        uniform_B = torch.from_numpy(uniforms(self._seeds, places)).to(self._device)
        weights_BV = logits[:, : self._vocabulary]
        if len(self._rows_B) < len(logits):  # others are greedy: their logits stay
            weights_BV = weights_BV[self._rows_B]
        # In place: new memory for so many numbers would cost more than what is done with them.
        weights_BV.sub_(weights_BV.amax(-1, keepdim=True))
        if self._has_temperature:
            weights_BV.div_(self._temperature_B1)
        weights_BV.exp_()
        if self._has_nucleus:
            tokens_B = draw_nucleus(weights_BV, uniform_B, self._top_p_B)
        else:
            tokens_B = draw(weights_BV, uniform_B)
        logits[self._rows_B, tokens_B] = float("inf")
        return logits

    def _order(self) -> None:
        """Bring what is asked of the requests into the order of their rows."""
        rows = sorted(self._requests)
        self._sampled = [self._requests[row] for row in rows]
        self._seeds = [request.seed for request in self._sampled]
        self._has_temperature = any(request.temperature != 1.0 for request in self._sampled)
        self._has_nucleus = any(request.top_p < 1.0 for request in self._sampled)
        self._rows_B = torch.tensor(rows, dtype=torch.long, device=self._device)
        temperatures = [request.temperature for request in self._sampled]
        self._temperature_B1 = torch.tensor(temperatures, device=self._device)[:, None]
        self._top_p_B = torch.tensor([request.top_p for request in self._sampled], device=self._device)


def sampling(*, seed: int, temperature: float, top_p: float) -> dict[str, Any]:
    """The arguments of vLLM's `SamplingParams` that have a request sampled here; temperature 0 is greedy."""
    if not temperature:
        return {"temperature": 0.0}
    return {"temperature": 0.0, "extra_args": {"gkd_seed": seed, "gkd_temperature": temperature, "gkd_top_p": top_p}}


def _sampled(params: Any, _prompt: list[int] | None, made: list[int]) -> _Request | None:
    asked = params.extra_args or {}
    if "gkd_seed" not in asked:
        return None
    return _Request(asked["gkd_seed"], asked["gkd_temperature"], asked["gkd_top_p"], made)
