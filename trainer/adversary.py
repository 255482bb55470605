"""The inner problem of an adversarial objective: what it owns learns from the whole batch before the student does.

Legend: T response tokens of a micro-batch.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from gkd.logits import FrozenLogits
from gkd.objectives.base import Adversary, ObjectiveInputs
from gkd.reduce import metric_means, metric_sums, weighted_sum
from gkd.types import ScoredRollout
from trainer.deepspeed_engine import DeepSpeedEngine
from trainer.micro_batch import MicroBatches
from trainer.share import RankShare
from trainer.step import TrainingDiverged


class AdversaryAscent:
    """Trains an adversary with AdamW, outside DeepSpeed: whole on every rank, and the same there.

    One of its steps makes as many forward passes of the student as a step of the student, without a graph. Gradients
    add up over micro-batches and ranks with the loss's own token weights, so that splits change nothing but rounding.
    """

    def __init__(
        self, adversary: Adversary, engine: DeepSpeedEngine, batches: MicroBatches, *, seed: int, suffix: str = ""
    ) -> None:
        """`seed` is of its first parameters; `suffix` ends the names of its metrics, where there are several."""
        self._adversary = adversary
        self._engine = engine
        self._batches = batches
        self._seed = seed
        self._suffix = suffix
        self._optimizer: torch.optim.AdamW | None = None

    def __call__(
        self, number: int, samples: Sequence[ScoredRollout], share: RankShare, *, learning_rate: float
    ) -> dict[str, float]:
        """Learn for the student's step `number`, on this rank's share of the batch.

        Returns:
            Loss and gradient norm of the last inner step, before its update.

        Raises:
            TrainingDiverged: on every rank and before the update, if the loss is infinite or not a number.
        """
        found: dict[str, float] = {}
        for _ in range(self._adversary.inner_steps(number)):
            found = self._inner_step(samples, share, learning_rate=learning_rate)
        measured = {f"{name}{self._suffix}": found.pop(name) for name in ("critic_loss", "critic_grad_norm")}
        self._adversary.end_step(found)
        return measured

    def state_dict(self) -> dict[str, Any]:
        """The adversary and its optimizer; None for an optimizer that has not begun."""
        optimizer = self._optimizer
        return {
            "adversary": self._adversary.state_dict(),
            "optimizer": None if optimizer is None else optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, device: torch.device) -> None:
        """Go on from what `state_dict` gave."""
        self._adversary.load_state_dict(state["adversary"], device=device)
        self._optimizer = None
        if state["optimizer"] is not None:
            self._optimizer = self._new_optimizer()
            self._optimizer.load_state_dict(state["optimizer"])

    def _inner_step(
        self, samples: Sequence[ScoredRollout], share: RankShare, *, learning_rate: float
    ) -> dict[str, float]:
        adversary = self._adversary
        totals: dict[str, float] = defaultdict(float)

        def learn_from(inputs: ObjectiveInputs, weights_T: torch.Tensor) -> torch.Tensor:
            # Within the forward pass, where ZeRO 3 has the head whole: the backward pass makes logits again.
            frozen = replace(inputs, student=FrozenLogits(inputs.student))
            with torch.enable_grad():
                adversary.prepare(frozen, seed=self._seed)
                output = adversary.loss(frozen)
                loss = weighted_sum(output.loss_T, weights_T, output.mask_T)
                if loss.requires_grad:  # there may be nothing here that concerns it
                    loss.backward()
            sums = metric_sums(output.metrics_T, output.partial_metrics_T, weights_T, output.mask_T)
            for name, value in (sums | {"critic_loss": loss.item()}).items():
                totals[name] += value
            return loss.detach()

        with torch.no_grad():
            for places in share.micro_batches:
                self._batches.through(samples, share, places, learn_from)
        means = metric_means(self._engine.sum_over_ranks(totals))
        if not math.isfinite(means["critic_loss"]):
            raise TrainingDiverged(
                f"the critics' loss is {means['critic_loss']}: neither they nor the student learnt from this step. "
                "Usual causes: a learning rate that is too high (trainer.learning_rate), or a teacher that gives no "
                "numbers"
            )
        norm = torch.nn.utils.clip_grad_norm_(self._with_whole_gradients(), adversary.grad_clip)
        self._optimizer = self._optimizer or self._new_optimizer()
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * adversary.learning_rate_multiplier
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return means | {"critic_grad_norm": float(norm)}

    def _with_whole_gradients(self) -> list[torch.nn.Parameter]:
        """The parameters that the batch concerns, on whichever rank; the others rest, their momentum too."""
        parameters = self._adversary.parameters()
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._engine.add_up([p.grad for p in parameters if p.grad is not None])
        for parameter in parameters:
            if parameter.grad is not None and not parameter.grad.any():
                parameter.grad = None
        return [parameter for parameter in parameters if parameter.grad is not None]

    def _new_optimizer(self) -> torch.optim.AdamW:
        # The learning rate is set before every step.
        return torch.optim.AdamW(self._adversary.parameters(), weight_decay=self._adversary.weight_decay)
