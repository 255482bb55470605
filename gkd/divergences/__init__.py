"""Divergences: pure functions `fn(student_logits_TV, teacher_logits_TV, *, **options) -> loss_T`.

No mask, no mean, no temperature: the objective divides the logits, the reducer averages. T tokens, V vocabulary rows.
"""

from collections.abc import Callable

import torch

from gkd.divergences.adaptive import adaptive_kl
from gkd.divergences.jsd import generalized_jsd
from gkd.divergences.kl import forward_kl, reverse_kl
from gkd.divergences.skew import skew_forward_kl, skew_reverse_kl
from gkd.divergences.total_variation import total_variation

Divergence = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(student_logits_TV, teacher_logits_TV) -> loss_T, options bound."""

__all__ = [
    "Divergence",
    "adaptive_kl",
    "forward_kl",
    "generalized_jsd",
    "reverse_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
]
