"""A loss over a large vocabulary whose gradient is made together with it.

A loss that is computed a few tokens at a time keeps no logits, so that its backward pass has to make all of them again,
the student's and the teacher's: two matrix products of six. But what the reducer will multiply each token's loss by is
known before (`gkd.reduce`), and so the gradient can be made while a chunk's logits are there. Legend: T tokens, t of a
chunk, V rows, H hidden width.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import Function

from gkd.head_linear import Applications, LinearHead
from gkd.logits import HeadLogits

LossOfChunk = Callable[[slice, torch.Tensor], tuple[torch.Tensor, ...]]
"""From the span of a chunk and the student's logits [t, V], in the model's dtype, to the loss [t], which depends on
those logits alone, and others [t] without a graph."""
_SAME = 1e-6
"""Relative difference up to which two weights are the same."""


def in_one_pass(
    logits: HeadLogits, weights_T: torch.Tensor, spans: Sequence[slice], function: LossOfChunk
) -> tuple[torch.Tensor, ...]:
    """What a function makes of all chunks, [T] each; the first, the loss, can be differentiated.

    Its backward pass hands out what was made here, if the gradient that comes in is `weights_T` or a multiple of it.
    With any other it makes the chunks again, so that the result is right whatever becomes of the loss.

    Args:
        logits: of the student; their head is a `LinearHead` that can stand apart.
        weights_T: the gradient of the whole loss with respect to each token's, but for a common factor.
        spans: of the chunks.
        function: called for each chunk; it gives the same when it is called again.
    """
    assert isinstance(logits.head, LinearHead)
    apart = logits.head.apart()
    chunks = _Chunks(logits, apart, spans, function)
    results, gradient_TH = chunks.run(weights_T)
    gate = logits.hidden_TH.new_zeros(()) if apart is None else apart.gate
    loss_T = _Loss.apply(logits.hidden_TH, gate, results[0], gradient_TH, weights_T, chunks)
    return loss_T, *results[1:]


class _Chunks:
    """Runs through all chunks, forward and backward."""

    def __init__(
        self, logits: HeadLogits, apart: Applications | None, spans: Sequence[slice], function: LossOfChunk
    ) -> None:
        self._hidden_TH = logits.hidden_TH.detach()
        self._head = logits.head if apart is None else apart.head
        self._num_rows = logits.num_rows
        self._spans = spans
        self._function = function
        self.apart = apart

    def run(self, weights_T: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """What the function returns, [T] each and without a graph, and the gradient of the weighted loss [T, H].

        That of the head's weights is added up in `apart`.
        """
        gradient_TH = torch.zeros_like(self._hidden_TH)
        # Written into what is there: a small tensor that outlives its chunk may lie where a large one was, and then the
        # allocator has no place for the next chunk's and takes more memory with every chunk.
        wholes: list[torch.Tensor] = []
        for span in self._spans:
            parts = self._chunk(span, weights_T[span], gradient_TH[span])
            wholes = wholes or [part.new_empty(len(weights_T)) for part in parts]
            for whole_T, part_t in zip(wholes, parts, strict=True):
                whole_T[span] = part_t
            del parts
        return wholes, gradient_TH

    def _chunk(self, span: slice, weights_t: torch.Tensor, gradient_tH: torch.Tensor) -> list[torch.Tensor]:
        """Of one chunk: what the function returns, and into `gradient_tH` the gradient of its weighted loss."""
        hidden_tH = self._hidden_TH[span].requires_grad_()
        with torch.enable_grad():
            results = self._function(span, self._head(hidden_tH)[:, : self._num_rows])
        torch.autograd.backward(results[0], weights_t.to(results[0].dtype), inputs=[hidden_tH])
        assert hidden_tH.grad is not None
        gradient_tH.copy_(hidden_tH.grad)
        return [result.detach() for result in results]


class _Loss(Function):
    """The loss per token, whose gradient is there."""

    @staticmethod
    def forward(
        ctx: Any,
        _hidden_TH: torch.Tensor,
        _gate: torch.Tensor,
        loss_T: torch.Tensor,
        gradient_TH: torch.Tensor,
        weights_T: torch.Tensor,
        chunks: _Chunks,
    ) -> torch.Tensor:
        ctx.save_for_backward(gradient_TH, weights_T)
        ctx.chunks = chunks
        ctx.is_spent = False  # the gradient of the head's weights is handed out once
        return loss_T.clone()

    @staticmethod
    def backward(ctx: Any, incoming_T: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient_TH, weights_T = ctx.saved_tensors
        chunks: _Chunks = ctx.chunks
        factor = None if ctx.is_spent else _factor(incoming_T, weights_T)
        ctx.is_spent = True
        if factor is None:
            if chunks.apart is not None:
                chunks.apart.forget()
            _, gradient_TH = chunks.run(incoming_T)
        elif factor != 1.0:
            gradient_TH = gradient_TH * factor
            if chunks.apart is not None:
                chunks.apart.scale(factor)
        return gradient_TH, gradient_TH.new_zeros(()), None, None, None, None


def _factor(incoming_T: torch.Tensor, weights_T: torch.Tensor) -> float | None:
    """What the weights were multiplied by; None if it was not the same for all."""
    if torch.equal(incoming_T, weights_T):
        return 1.0
    largest = weights_T.abs().argmax()
    factor = incoming_T[largest] / weights_T[largest]
    expected_T = factor * weights_T
    is_same = ((incoming_T - expected_T).abs() <= _SAME * expected_T.abs()).all()
    return factor.item() if is_same and factor.isfinite() else None
