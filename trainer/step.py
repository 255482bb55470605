"""One optimizer step of one rank: student forward, objective, backward for each micro-batch, then the update.

Legend: T response tokens of a micro-batch, V shared vocabulary rows.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from gkd.logits import Logits
from gkd.objectives.base import Objective, ObjectiveInputs
from gkd.packing import pack
from gkd.reduce import weighted_sum
from gkd.response_forward import ResponseForward
from gkd.types import ScoredRollout
from trainer.deepspeed_engine import DeepSpeedEngine
from trainer.share import RankShare
from trainer.teacher_source import TeacherSource


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What one optimizer step measured, over all ranks."""

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
    """Forward passes of each rank."""


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
        teacher: TeacherSource,
        rows: int,
    ) -> None:
        """`rows` is the number of vocabulary rows in the loss."""
        self._engine = engine
        self._forward = forward
        self._objective = objective
        self._teacher = teacher
        self._rows = rows

    def __call__(self, samples: Sequence[ScoredRollout], share: RankShare, *, learning_rate: float) -> StepReport:
        """Train on this rank's share of a batch; every rank calls this with its own share of the same batch.

        The split into ranks and micro-batches changes the result by rounding only.

        Args:
            samples: the share's samples, in its order.
            share: their weights and micro-batches.
            learning_rate: of this step.

        Raises:
            TrainingDiverged: on every rank and before the update, if the batch's loss is infinite or not a number.
        """
        totals: dict[str, float] = defaultdict(float)
        for places in share.micro_batches:
            for name, value in self._micro_batch(samples, share.weights, places).items():
                totals[name] += value
        totals = self._engine.sum_over_ranks(totals)
        if not math.isfinite(totals["total"]):
            raise TrainingDiverged(
                f"the loss is {totals['total']}: the weights are left as they were before this step. Usual causes: a "
                "learning rate that is too high (trainer.learning_rate), no clipping (trainer.grad_clip), or a teacher "
                "that gives probability 0 to a token"
            )
        grad_norm = self._engine.step(learning_rate)
        return StepReport(
            loss=totals.pop("total"),
            num_tokens=round(totals.pop("tokens")),
            metrics=dict(totals),
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            num_micro_batches=len(share.micro_batches),
        )

    def _micro_batch(
        self, samples: Sequence[ScoredRollout], weights: Sequence[float], places: Sequence[int]
    ) -> dict[str, float]:
        """Forward and backward of a few samples; their share of the loss, of the tokens and of the metrics."""
        # A pass with nothing to add still has to be made: the shortest sample stands in, with every token masked.
        stand_in = min(range(len(samples)), key=lambda i: len(samples[i].rollout.token_ids))
        members = [samples[i] for i in places or (stand_in,)]
        packed = pack(
            [s.rollout.prompt_ids for s in members],
            [s.rollout.response_ids for s in members],
            share_rows=self._forward.share_rows,
        )
        device = self._forward.device
        mask_T = _loss_mask(members) if places else torch.zeros(len(packed.response_ids_T), dtype=torch.bool)
        token_weights = torch.tensor([weights[i] for i in places or (stand_in,)])
        weights_T = torch.repeat_interleave(token_weights, torch.tensor(packed.response_lengths)).to(device)
        inputs = partial(
            ObjectiveInputs,
            num_rows=self._rows,
            teacher=self._teacher.view(members),
            response_ids_T=packed.response_ids_T.to(device),
            mask_T=mask_T.to(device),
            lengths=packed.response_lengths,
            on_policy_N=torch.tensor([s.rollout.source == "student" for s in members]).to(device),
        )
        sums = {"tokens": float(mask_T.sum())}

        def loss_of(logits: Logits) -> torch.Tensor:
            output = self._objective(inputs(student=logits))
            for name, values_T in output.metrics_T.items():
                sums[name] = weighted_sum(values_T, weights_T, output.mask_T).item()
            return weighted_sum(output.loss_T, weights_T, output.mask_T)

        loss = self._forward.through(packed, loss_of, num_rows=self._rows)
        self._engine.backward(loss)
        return sums | {"total": loss.item()}


def _loss_mask(samples: Sequence[ScoredRollout]) -> torch.Tensor:
    """[T] bool, which response tokens count."""
    flags = [r.loss_mask or (True,) * len(r.response_ids) for r in (s.rollout for s in samples)]
    return torch.tensor([flag for mask in flags for flag in mask], dtype=torch.bool)
