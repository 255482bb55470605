"""One optimizer step: micro-batches by token budget, student forward, objective, backward, update.

Legend: T response tokens of a micro-batch, V shared vocabulary rows.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gkd.config.objective import Reduction
from gkd.objectives.base import Objective, ObjectiveInputs
from gkd.packing import pack, split_by_tokens
from gkd.reduce import sequence_token_weights, weighted_sum
from gkd.response_forward import ResponseForward
from gkd.types import ScoredRollout
from trainer.deepspeed_engine import DeepSpeedEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What one optimizer step measured."""

    loss: float
    """The batch's loss, in nats per token (or as the reduction says)."""
    metrics: dict[str, float]
    """The objective's own metrics, averaged with the loss's weights."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    """Of this step."""
    num_tokens: int
    """Response tokens in the loss."""
    num_micro_batches: int
    """Forward passes."""


class TrainingDiverged(ArithmeticError):
    """The loss is not a number."""


class TrainStep:
    """Turns a scored batch into one update of the student."""

    def __init__(
        self,
        engine: DeepSpeedEngine,
        forward: ResponseForward,
        objective: Objective,
        *,
        rows: int,
        reduction: Reduction,
        tokens_per_micro_batch: int,
    ) -> None:
        """`rows` is the number of vocabulary rows in the loss."""
        self._engine = engine
        self._forward = forward
        self._objective = objective
        self._rows = rows
        self._reduction = reduction
        self._tokens_per_micro_batch = tokens_per_micro_batch

    def __call__(self, batch: Sequence[ScoredRollout], *, learning_rate: float) -> StepReport:
        """Train on a batch. Its split into micro-batches changes the result by rounding only.

        Raises:
            TrainingDiverged: before the update, if the loss is infinite or not a number.
        """
        weights = sequence_token_weights([len(s.rollout.response_ids) for s in batch], self._reduction)
        groups = split_by_tokens([len(s.rollout.token_ids) for s in batch], self._tokens_per_micro_batch)
        totals: dict[str, float] = defaultdict(float)
        for group in groups:
            for name, value in self._micro_batch([batch[i] for i in group], [weights[i] for i in group]).items():
                totals[name] += value
        if not math.isfinite(totals["total"]):
            raise TrainingDiverged(
                f"the loss is {totals['total']}: the weights are left as they were before this step. Usual causes: a "
                "learning rate that is too high (trainer.learning_rate), no clipping (trainer.grad_clip), or a teacher "
                "that gives probability 0 to a token"
            )
        grad_norm = self._engine.step(learning_rate)
        return StepReport(
            loss=totals.pop("total"),
            metrics=dict(totals),
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            num_tokens=sum(len(s.rollout.response_ids) for s in batch),
            num_micro_batches=len(groups),
        )

    def _micro_batch(self, samples: Sequence[ScoredRollout], weights: Sequence[float]) -> dict[str, float]:
        """Forward and backward of a few samples; their share of the loss and of the metrics."""
        packed = pack(
            [s.rollout.prompt_ids for s in samples],
            [s.rollout.response_ids for s in samples],
            share_rows=self._forward.share_rows,
        )
        device = self._forward.device
        student_TV = self._forward(packed)[:, : self._rows]
        weights_T = torch.repeat_interleave(torch.tensor(weights), torch.tensor(packed.response_lengths)).to(device)
        output = self._objective(
            ObjectiveInputs(
                student_logits_TV=student_TV,
                teacher_logits_TV=_teacher_logits(samples, device),
                response_ids_T=packed.response_ids_T.to(device),
                mask_T=torch.ones(len(packed.response_ids_T), dtype=torch.bool, device=device),
            )
        )
        loss = weighted_sum(output.loss_T, weights_T, output.mask_T)
        self._engine.backward(loss)
        metrics = {"total": loss.item()}
        for name, values_T in output.metrics_T.items():
            metrics[name] = weighted_sum(values_T, weights_T, output.mask_T).item()
        return metrics


def _teacher_logits(samples: Sequence[ScoredRollout], device: torch.device) -> torch.Tensor | None:
    signals = [s.signal for s in samples if s.signal is not None]
    if not signals:
        return None
    assert len(signals) == len(samples), "either every sample of a batch is scored or none is"
    return torch.cat([signal.tensor() for signal in signals]).to(device)
