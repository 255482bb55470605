"""The head's matrix product, for losses that apply it to a few tokens at a time.

A linear layer that is applied n times makes n gradients [V, H] in the backward pass and adds them up: for 152,000 rows
each is as large as the weights, and moving them takes longer than the products. Here every application adds its part to
one buffer in place; when all have run, it is the weight's gradient. Legend: t tokens of a chunk, V rows, H width.
"""

from typing import Any

import torch
from torch.autograd import Function
from torch.nn.functional import linear

from gkd.head import Head


class _Total:
    """The gradient that is added up."""

    gradient_VH: torch.Tensor | None = None


class _Gate(Function):
    """Stands between the weight and its applications: its backward pass runs when all of theirs have."""

    @staticmethod
    def forward(ctx: Any, weight_VH: torch.Tensor, total: _Total) -> torch.Tensor:
        ctx.total = total
        return weight_VH.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _gradient: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        gradient_VH, ctx.total.gradient_VH = ctx.total.gradient_VH, None
        return gradient_VH, None


class _Apply(Function):
    """hidden @ weight.T. The weight is read when it is needed: ZeRO 3 puts it together anew for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden_tH: torch.Tensor, gate: torch.Tensor, layer: torch.nn.Linear, total: _Total
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden_tH)
        ctx.layer, ctx.total = layer, total
        return linear(hidden_tH, layer.weight)

    @staticmethod
    def backward(ctx: Any, gradient_tV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        (hidden_tH,) = ctx.saved_tensors
        total: _Total = ctx.total
        if total.gradient_VH is None:
            total.gradient_VH = gradient_tV.T @ hidden_tH
        else:
            total.gradient_VH.addmm_(gradient_tV.T, hidden_tH)
        return gradient_tV @ ctx.layer.weight, gradient_tV.new_zeros(()), None, None


def shared_gradient(layer: torch.nn.Module, forward: Head) -> Head:
    """The head's linear layer as a function that is applied many times and then differentiated once.

    Args:
        layer: the head's.
        forward: its own forward pass, used where the layer is none of torch's own (an adapter around one) or frozen.
    """
    if type(layer) is not torch.nn.Linear or not (layer.weight.requires_grad and torch.is_grad_enabled()):
        return forward
    total = _Total()
    gate = _Gate.apply(layer.weight, total)

    def apply(hidden_tH: torch.Tensor) -> torch.Tensor:
        raw_tV = _Apply.apply(hidden_tH, gate, layer, total)
        return raw_tV if layer.bias is None else raw_tV + layer.bias

    return apply
