"""What one stage of a run learns with: its objective, what that owns, and its learning rates."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from gkd.config.objective import BuiltObjective
from gkd.objectives import build_objective
from gkd.objectives.base import adversaries_of
from gkd.trace import Lane
from gkd.types import ScoredRollout
from trainer.adversary import AdversaryAscent
from trainer.deepspeed_engine import DeepSpeedEngine
from trainer.micro_batch import MicroBatches
from trainer.schedule import learning_rate
from trainer.share import RankShare
from trainer.step import StepReport, TrainStep

_ADVERSARIES = "adversaries.pt"
"""Beside DeepSpeed's state in a checkpoint: what the objective owns, the same on every rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSettings:
    """What a training rank needs to know of a stage; a run without stages is one."""

    objective: BuiltObjective
    """What is minimised."""
    learning_rate: float
    """Peak."""
    lr_schedule: Literal["constant", "linear", "cosine"]
    """Decay after warm-up."""
    warmup_steps: int
    """Steps of linear warm-up."""
    steps: int
    """Where the decay ends, counted from the stage's begin."""


class Stage:
    """Makes the optimizer steps of a stage. Critics begin with it and end with it; the optimizer's state goes on."""

    def __init__(
        self, settings: StageSettings, engine: DeepSpeedEngine, batches: MicroBatches, lane: Lane, *, seed: int
    ) -> None:
        """`seed` is of what begins with the stage."""
        self._settings = settings
        objective = build_objective(settings.objective)
        adversaries = adversaries_of(objective)
        suffixes = [""] if len(adversaries) == 1 else [f"_{place + 1}" for place in range(len(adversaries))]
        self._ascents = [
            AdversaryAscent(adversary, engine, batches, seed=seed, suffix=suffix)
            for adversary, suffix in zip(adversaries, suffixes, strict=True)
        ]
        self._step = TrainStep(engine, batches, objective, lane, before=self._ascents)

    def step(self, number: int, samples: Sequence[ScoredRollout], share: RankShare) -> StepReport:
        """Step `number` of the stage, from 1, on this rank's share of the batch."""
        settings = self._settings
        return self._step(
            number,
            samples,
            share,
            learning_rate=learning_rate(
                number,
                peak=settings.learning_rate,
                schedule=settings.lr_schedule,
                warmup_steps=settings.warmup_steps,
                max_steps=settings.steps,
            ),
        )

    def save(self, folder: Path) -> None:
        """Write what the objective owns, if anything."""
        if self._ascents:
            torch.save([ascent.state_dict() for ascent in self._ascents], folder / _ADVERSARIES)

    def load(self, folder: Path, *, device: torch.device) -> None:
        """Go on from what `save` wrote.

        Raises:
            FileNotFoundError: if the objective owns something, and it is not there.
        """
        if not self._ascents:
            return
        states = torch.load(folder / _ADVERSARIES, map_location="cpu", weights_only=True)
        for ascent, state in zip(self._ascents, states, strict=True):
            ascent.load_state_dict(state, device=device)
