"""Divergences: pure functions `fn(student_logits_TV, teacher_logits_TV, *, **options) -> loss_T`.

No mask, no mean, no temperature: the objective divides the logits, the reducer averages. T tokens, V vocabulary rows.
"""

from collections.abc import Callable

import torch

from gkd.divergences.jsd import generalized_jsd
from gkd.divergences.kl import forward_kl, reverse_kl

Divergence = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(student_logits_TV, teacher_logits_TV) -> loss_T, options bound."""

__all__ = ["Divergence", "forward_kl", "generalized_jsd", "reverse_kl"]
