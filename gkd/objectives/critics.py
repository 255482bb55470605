"""Critics: linear heads that value every token at every state, within bounds.

Legend: t tokens of a chunk, V vocabulary rows, H width of the hidden states that a critic reads, r rank.
"""

from dataclasses import dataclass

import torch

from gkd.logits import raised


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticSettings:
    """What a critic is, but for the sizes of the models."""

    bound: float = 1.0
    """B: values are within [-B, B]. The inner problem is linear in the values, so without bounds it has no solution."""
    rank: int | None = None
    """Of the weight; None is a whole [V, H] matrix."""
    init_scale: float = 1e-3
    """Standard deviation of the first weights: values start at almost 0."""


class Critic(torch.nn.Module):
    """f(s, a) = B tanh(W h(s) / sqrt(H))_a, or with W = U D of rank r, B tanh(U D h(s) / sqrt(H r))_a.

    The weights are float32, whatever the models are.
    """

    def __init__(self, width: int, rows: int, settings: CriticSettings, *, generator: torch.Generator) -> None:
        """Random weights from a generator on the CPU.

        Args:
            width: H.
            rows: V.
            settings: the rest.
            generator: is advanced.
        """
        super().__init__()
        self.width, self.rows = width, rows
        self._bound = settings.bound
        rank = settings.rank
        inner = rank or width
        # D keeps the size of what it reads, so that U learns as a whole matrix would.
        self.down_rH = None if rank is None else torch.nn.Parameter(torch.randn(rank, width, generator=generator))
        self.up_Vr = torch.nn.Parameter(torch.randn(rows, inner, generator=generator) * settings.init_scale)

    def forward(self, hidden_tH: torch.Tensor) -> torch.Tensor:
        """[t, V] values, at most B in size."""
        inner = raised(hidden_tH) / hidden_tH.shape[-1] ** 0.5
        if self.down_rH is not None:
            inner = torch.nn.functional.linear(inner, self.down_rH) / len(self.down_rH) ** 0.5
        return self._bound * torch.nn.functional.linear(inner, self.up_Vr).tanh()
