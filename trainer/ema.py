"""The exponential moving average of the student's weights, kept by every rank for itself.

With an adapter only the adapter is trained, so only the adapter is averaged. Not under ZeRO 3, where no rank has whole
weights.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


class WeightAverage:
    """a <- decay a + (1 - decay) w after every optimizer step, in float32; a begins as the first weights."""

    def __init__(self, model: Any, *, decay: float) -> None:
        """Begin with the weights that are trained, as they are now."""
        self._decay = decay
        self._weights: dict[str, torch.nn.Parameter] = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._averages = {name: p.detach().to(torch.float32, copy=True) for name, p in self._weights.items()}
        self._in_their_dtype()

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step."""
        for name, weight in self._weights.items():
            self._averages[name].lerp_(weight.detach().float(), 1 - self._decay)
        self._in_their_dtype()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model with the average for weights. The weights themselves stay where the optimizer has them."""
        kept = {name: weight.data for name, weight in self._weights.items()}
        for name, weight in self._weights.items():
            weight.data = self._used[name]
        try:
            yield
        finally:
            for name, weight in self._weights.items():
                weight.data = kept[name]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Name -> float32 average, to go on from; it shares memory with the average."""
        return dict(self._averages)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        assert state.keys() == self._averages.keys(), "a run resumes with the weights that it trained"
        for name, average in self._averages.items():
            average.copy_(state[name])
        self._in_their_dtype()

    def _in_their_dtype(self) -> None:
        """Where the model runs in float32 this costs no memory: the averages themselves are used."""
        self._used = {name: self._averages[name].to(weight.dtype) for name, weight in self._weights.items()}
