"""The head's matrix product, for losses that apply it to a few tokens at a time.

A linear layer that is applied n times makes n gradients [V, H] in the backward pass and adds them up: for 152,000 rows
each is as large as the weights, and moving them takes longer than the products. Here every application adds its part to
one buffer in place; when all have run, it is the weight's gradient. Legend: t tokens of a chunk, V rows, H width.
"""

from functools import partial
from typing import Any, cast

import torch
from torch.autograd import Function
from torch.nn.functional import linear

from gkd.head import Finish, Head
from gkd.logits import raised


class _Total:
    """The gradients that are added up, in float32 at least: bfloat16 would lose most of what comes late."""

    weight_VH: torch.Tensor | None = None
    bias_V: torch.Tensor | None = None

    def add(self, gradient_tV: torch.Tensor, hidden_tH: torch.Tensor, *, with_bias: bool) -> None:
        """The part of one application."""
        if self.weight_VH is None:
            self.weight_VH = raised(gradient_tV.T @ hidden_tH)
        elif self.weight_VH.dtype == hidden_tH.dtype:
            self.weight_VH.addmm_(gradient_tV.T, hidden_tH)
        else:
            self.weight_VH.add_(gradient_tV.T @ hidden_tH)
        if with_bias:
            part_V = gradient_tV.sum(0, dtype=self.weight_VH.dtype)
            self.bias_V = part_V if self.bias_V is None else self.bias_V.add_(part_V)


class _Gate(Function):
    """Stands between the weights and their applications: its backward pass runs when all of theirs have."""

    @staticmethod
    def forward(ctx: Any, weight_VH: torch.Tensor, _bias_V: torch.Tensor | None, total: _Total) -> torch.Tensor:
        ctx.total, ctx.dtype = total, weight_VH.dtype
        return weight_VH.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        total: _Total = ctx.total
        weight_VH, bias_V = (None if part is None else part.to(ctx.dtype) for part in (total.weight_VH, total.bias_V))
        total.weight_VH = total.bias_V = None
        return weight_VH, bias_V, None


class _Apply(Function):
    """hidden @ weight.T + bias. The weight is read when it is needed: ZeRO 3 puts it together anew for the backward
    pass.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_tH: torch.Tensor, gate: torch.Tensor, layer: torch.nn.Linear, total: _Total
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden_tH)
        ctx.layer, ctx.total = layer, total
        return linear(hidden_tH, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient_tV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        (hidden_tH,) = ctx.saved_tensors
        total: _Total = ctx.total
        total.add(gradient_tV, hidden_tH, with_bias=ctx.layer.bias is not None)
        return gradient_tV @ ctx.layer.weight, gradient_tV.new_zeros(()), None, None


class Applications:
    """Some applications of a layer, whose gradient is theirs alone: `head`, to be applied any number of times."""

    def __init__(self, layer: torch.nn.Linear, finish: Head) -> None:
        """`finish` follows the layer."""
        self._layer = layer
        self._finish = finish
        self._total = _Total()
        self.gate = _Gate.apply(layer.weight, layer.bias, self._total)
        """A zero that whatever uses the gradient has to depend on."""

    def head(self, hidden_tH: torch.Tensor) -> torch.Tensor:
        """[t, V] logits."""
        return self._finish(_Apply.apply(hidden_tH, self.gate, self._layer, self._total))

    def scale(self, factor: float) -> None:
        """Multiply what was added up so far."""
        for gradient in (self._total.weight_VH, self._total.bias_V):
            if gradient is not None and factor != 1.0:
                gradient.mul_(factor)

    def forget(self) -> None:
        """Begin adding up anew."""
        self._total.weight_VH = self._total.bias_V = None


class LinearHead:
    """A head that is applied many times and differentiated once, within one forward pass."""

    def __init__(self, layer: torch.nn.Module, forward: Head, finish: Head = Finish()) -> None:
        """Take the weights as they are now.

        Args:
            layer: the head's.
            forward: its own forward pass, used where the layer is frozen or not torch's own (an adapter around one).
            finish: what follows the layer.
        """
        learns = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in layer.parameters())
        is_plain = type(layer) is torch.nn.Linear and layer.weight.requires_grad
        self._apply = partial(Applications, cast(torch.nn.Linear, layer), finish) if learns and is_plain else None
        self._common = self._apply() if self._apply else None
        self._forward, self._finish = forward, finish
        self.can_stand_apart = not learns or is_plain
        """Whether all gradients of it are known to `apart`."""

    def __call__(self, hidden_tH: torch.Tensor) -> torch.Tensor:
        """[t, V] logits."""
        return self._finish(self._forward(hidden_tH)) if self._common is None else self._common.head(hidden_tH)

    def apart(self) -> Applications | None:
        """Applications with a gradient of their own; None where the head learns nothing."""
        return self._apply() if self._apply else None
