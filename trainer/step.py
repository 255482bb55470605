"""One optimizer step of one rank: student forward, objective, backward for each micro-batch, then the update.

Legend: T response tokens of a micro-batch.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from gkd.objectives.base import Objective, ObjectiveInputs
from gkd.reduce import metric_means, metric_sums, weighted_sum
from gkd.trace import Lane
from gkd.types import ScoredRollout
from trainer.deepspeed_engine import DeepSpeedEngine
from trainer.micro_batch import MicroBatches
from trainer.sample_data import LogprobWatch, SampleReport
from trainer.share import RankShare


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
    samples: dict[int, SampleReport] = field(default_factory=dict)
    """By index in the batch, what was found out about the samples whose log-probabilities the engine recorded. Of one
    rank's own samples, until the ranks' reports are joined."""


class TrainingDiverged(ArithmeticError):
    """The loss is not a number."""


class BeforeStudent(Protocol):
    """Something that learns from a batch before the student does."""

    def __call__(
        self, number: int, samples: Sequence[ScoredRollout], share: RankShare, *, learning_rate: float
    ) -> dict[str, float]:
        """Learn for the student's step `number`, with the student's learning rate given; metrics, over all ranks."""
        ...


class TrainStep:
    """Turns a scored batch into one update of the student."""

    def __init__(
        self,
        engine: DeepSpeedEngine,
        batches: MicroBatches,
        objective: Objective,
        lane: Lane,
        *,
        before: Sequence[BeforeStudent],
    ) -> None:
        """`before` is what learns from a batch before the student does."""
        self._engine = engine
        self._batches = batches
        self._objective = objective
        self._lane = lane
        self._before = before

    def __call__(
        self, number: int, samples: Sequence[ScoredRollout], share: RankShare, *, learning_rate: float
    ) -> StepReport:
        """Train on this rank's share of a batch; every rank calls this with its own share of the same batch.

        The split into ranks and micro-batches changes the result by rounding only.

        Args:
            number: of the step, from 1.
            samples: the share's samples, in its order.
            share: their weights and micro-batches.
            learning_rate: of this step.

        Raises:
            TrainingDiverged: on every rank, if the batch's loss or its gradient is infinite or not a number.
        """
        learnt: dict[str, float] = {}
        for learn in self._before:
            with self._lane.span("adversary"):
                learnt |= learn(number, samples, share, learning_rate=learning_rate)
        totals: dict[str, float] = defaultdict(float)
        reports: dict[int, SampleReport] = {}
        for places in share.micro_batches:
            with self._lane.span("micro-batch", samples=len(places)):
                sums = self._micro_batch(samples, share, places, reports)
            for name, value in sums.items():
                totals[name] += value
        totals = self._engine.sum_over_ranks(totals)
        if not math.isfinite(totals["total"]):
            raise TrainingDiverged(
                f"the loss is {totals['total']}: the weights are left as they were before this step. Usual causes: a "
                "learning rate that is too high (trainer.learning_rate), no clipping (trainer.grad_clip), or a teacher "
                "that gives probability 0 to a token"
            )
        with self._lane.span("optimizer"):
            grad_norm = self._engine.step(learning_rate)
        if not math.isfinite(grad_norm):
            raise TrainingDiverged(
                f"the gradient's norm is {grad_norm}, though the loss is finite: what this step made of the weights is "
                "lost, and the run goes on from its last checkpoint. Usual causes: a divergence, an objective or a "
                "token weight of your own whose gradient is no number, or an overflow (trainer.dtype)"
            )
        return StepReport(
            loss=totals.pop("total"),
            num_tokens=round(totals.pop("tokens")),
            metrics=metric_means(totals) | learnt,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            num_micro_batches=len(share.micro_batches),
            samples=reports,
        )

    def _micro_batch(
        self,
        samples: Sequence[ScoredRollout],
        share: RankShare,
        places: Sequence[int],
        reports: dict[int, SampleReport],
    ) -> dict[str, float]:
        """Forward and backward of a few samples; their share of the loss, of the tokens and of the metrics.

        What is found out about each goes into `reports`, under its index in the batch.
        """
        sums: dict[str, float] = {}

        def loss_of(inputs: ObjectiveInputs, weights_T: torch.Tensor) -> torch.Tensor:
            watch = LogprobWatch(len(inputs.mask_T)) if inputs.sampler_logprobs_T is not None else None
            output = self._objective(replace(inputs, watch=watch))
            if watch is not None and places:
                indices = [share.samples[place] for place in places]
                reports.update(zip(indices, watch.reports(output, inputs.lengths), strict=True))
            sums["tokens"] = float(inputs.mask_T.sum())
            sums.update(metric_sums(output.metrics_T, output.partial_metrics_T, weights_T, output.mask_T))
            return weighted_sum(output.loss_T, weights_T, output.mask_T)

        loss = self._batches.through(samples, share, places, loss_of)
        self._engine.backward(loss)
        return sums | {"total": loss.item()}
