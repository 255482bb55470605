"""A causal language model at response positions only, whatever its architecture.

A hook on the decoder keeps the hidden states that predict response tokens and drops the rest, so `[all positions,
vocabulary]` is never computed. Where the head can be applied on its own (`gkd.head`), not even `[response positions,
vocabulary]` is: `through` hands out logits that are made a few tokens at a time. Legend: R rows, S positions, T
response tokens, H hidden width, V rows of the head.
"""

from collections.abc import Callable
from typing import Any

import torch

from gkd.head import Head, read_finish
from gkd.head_linear import LinearHead
from gkd.logits import HeadLogits, Logits, WholeLogits
from gkd.packing import PackedRows, pack

Use = Callable[[Logits], torch.Tensor]
"""What is made of the logits [T, V]: a scalar or per-token values, with their graph."""


class ResponseForward:
    """Runs a Hugging Face causal language model for its response positions."""

    def __init__(self, model: Any, *, run: Callable[..., Any] | None = None) -> None:
        """Hook the model.

        Args:
            model: a `PreTrainedModel` for causal language modelling.
            run: what to call in the model's place (a DeepSpeed engine that wraps it); the model itself by default.

        Raises:
            ValueError: if the architecture does not predict the selected positions as it does the whole sequence.
        """
        self._model = model
        self._run = run or model
        self._selected_T: torch.Tensor | None = None
        self._use: Use | None = None
        self._use_rows = 0
        self._decoder = model.get_decoder()
        self._decoder.register_forward_hook(self._select)
        self._whole_forward = model.forward
        model.forward = self._forward
        self._linear = model.get_output_embeddings()
        self._linear_forward = self._linear.forward
        self._linear.forward = self._apply_linear
        self._finish = read_finish(model.config)
        self.device = next(model.parameters()).device
        self.share_rows = False
        self.has_own_head = True
        self.num_head_rows = self._check_selection()
        # Where rounding hides a small leak (bfloat16) sharing is given up early: all that costs is padding.
        self.share_rows = self.packing_gap() < (1e-3 if _is_float32(model) else 0.05)

    def __call__(self, packed: PackedRows) -> torch.Tensor:
        """Logits [T, V] at temperature 1, in the model's dtype; gradients as the caller's context has them."""
        return self._at_responses(packed).logits[0]

    def through(self, packed: PackedRows, use: Use, *, num_rows: int) -> torch.Tensor:
        """What `use` makes of the logits of the first `num_rows` rows.

        `use` is called within the forward pass, where all ranks have the head's weights whole (ZeRO 3 gathers them for
        one call of the head, and this is that call): whatever it does with the logits costs no further gathering.

        Returns:
            What `use` returned, ready for backward.
        """
        if not self.has_own_head:
            return use(WholeLogits(self(packed)[:, :num_rows]))
        self._use, self._use_rows = use, num_rows
        try:
            return self._at_responses(packed)
        finally:
            self._use = None

    def hidden(self, packed: PackedRows) -> torch.Tensor:
        """Last hidden states [T, H]: what the head turns into the logits at the response positions."""
        found = []

        def keep(logits: Logits) -> torch.Tensor:
            assert isinstance(logits, HeadLogits)
            found.append(logits.hidden_TH)
            return logits.hidden_TH.sum()

        self.through(packed, keep, num_rows=self.num_head_rows)
        return found[0]

    @property
    def head(self) -> Head:
        """The head as a function of hidden states [T, H]; under ZeRO 3 only within `through`."""
        return lambda hidden_TH: self._finish(self._linear_forward(hidden_TH))

    def _at_responses(self, packed: PackedRows) -> Any:
        positions = {} if packed.position_ids_RS is None else {"position_ids": packed.position_ids_RS.to(self.device)}
        self._selected_T = packed.response_index_T.to(self.device)
        try:
            return self._run(input_ids=packed.input_ids_RS.to(self.device), use_cache=False, **positions)
        finally:
            self._selected_T = None

    def _forward(self, *args: Any, **inputs: Any) -> Any:
        """In the place of the model's own forward pass: up to the head, whose logits somebody uses one by one."""
        if self._use is None:
            return self._whole_forward(*args, **inputs)
        # Wrappers (peft) add arguments that say nothing.
        given = {name: value for name, value in inputs.items() if value is not None}
        return self._linear(self._decoder(**given)[0])

    def _apply_linear(self, hidden: torch.Tensor) -> torch.Tensor:
        """In the place of the head's own forward pass."""
        if self._use is None:
            return self._linear_forward(hidden)
        head = LinearHead(self._linear, self._linear_forward, self._finish)
        return self._use(HeadLogits(hidden[0], head, num_rows=self._use_rows))

    def _select(self, _module: Any, _args: Any, output: Any) -> Any:
        if self._selected_T is None:
            return output
        hidden_TH = output[0].flatten(0, 1).index_select(0, self._selected_T)
        if isinstance(output, tuple):
            return (hidden_TH.unsqueeze(0), *output[1:])
        output.last_hidden_state = hidden_TH.unsqueeze(0)
        return output

    @torch.no_grad()
    def _check_selection(self) -> int:
        """Compare selected with whole-sequence logits on a few tokens; the head's number of rows."""
        prompts, responses = _ragged_example(self._model)
        packed = pack(prompts, responses, share_rows=False)
        selected = self(packed)
        whole = self._run(input_ids=packed.input_ids_RS.to(self.device), use_cache=False).logits
        gap = (selected - whole.flatten(0, 1)[packed.response_index_T.to(self.device)]).abs().max().item()
        # Logits of bfloat16 models may differ by units in the last place of the largest; a wrong position by far more.
        tolerance = 1e-3 if _is_float32(self._model) else 2**-6 * max(1.0, whole.abs().max().item())
        if not gap < tolerance:
            raise ValueError(
                f"{type(self._model).__name__} does not compute its logits from its decoder's last hidden state alone "
                f"(off by {gap:.2g}): this architecture is not supported"
            )
        apart = self.through(packed, lambda logits: logits.rows(slice(0, logits.num_tokens)), num_rows=whole.shape[-1])
        self.has_own_head = (apart - selected).abs().max().item() < tolerance
        return whole.shape[-1]

    @torch.no_grad()
    def packing_gap(self) -> float:
        """Largest difference in log-probability between sequences that share a row and the same sequences alone.

        Position ids keep sequences apart in many architectures but not in all (OPT is 0.3 nats off), so each model is
        asked; where sequences leak, `share_rows` is off and every row holds one sequence.
        """
        prompts, responses = _ragged_example(self._model)
        shared, alone = (self(pack(prompts, responses, share_rows=share)) for share in (True, False))
        return (shared.float().log_softmax(-1) - alone.float().log_softmax(-1)).abs().max().item()


def _is_float32(model: Any) -> bool:
    return next(model.parameters()).dtype == torch.float32


def _ragged_example(model: Any) -> tuple[list[list[int]], list[list[int]]]:
    """Sequences of several lengths, of which some fit into one row together."""
    generator = torch.Generator().manual_seed(0)
    rows = model.get_input_embeddings().num_embeddings  # a sharded weight has no shape
    sequences = [torch.randint(0, rows, (n,), generator=generator).tolist() for n in (12, 5, 7, 4, 8)]
    return [s[:2] for s in sequences], [s[2:] for s in sequences]
