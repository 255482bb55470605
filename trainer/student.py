"""One rank's student: model, DeepSpeed engine, and everything that is asked of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from gkd.config.objective import DistillObjective, SftObjective
from gkd.importing import load_object
from gkd.interfaces import WeightSender, WeightUpdate
from gkd.model_loading import load_causal_lm
from gkd.objectives import build_objective
from gkd.packing import pack
from gkd.response_forward import ResponseForward
from gkd.types import Rollout, ScoredRollout
from trainer.deepspeed_engine import DeepSpeedEngine, EngineSettings
from trainer.schedule import learning_rate
from trainer.step import StepReport, TrainStep
from trainer.weights import checkpoint_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentSettings:
    """Everything a training rank needs to know, from the config and the models."""

    model: str
    """Folder or hub name."""
    init: Literal["pretrained", "random"]
    """Where the first weights come from."""
    seed: int
    """Of random weights and dropout."""
    dropout: bool
    """Whether the model's own dropout acts in training."""
    rows: int
    """Vocabulary rows in the loss."""
    objective: DistillObjective | SftObjective
    """What is minimised."""
    tokens_per_micro_batch: int
    """Most positions in a forward pass."""
    learning_rate: float
    """Peak."""
    lr_schedule: Literal["constant", "linear", "cosine"]
    """Decay after warm-up."""
    warmup_steps: int
    """Steps of linear warm-up."""
    max_steps: int
    """Where the decay ends."""
    engine: EngineSettings
    """DeepSpeed's part."""
    sender: str
    """Import path of the weight sender."""
    sender_kwargs: dict[str, object]
    """Its arguments."""


class Student:
    """Trains, scores, sends, saves and exports the student."""

    def __init__(self, settings: StudentSettings) -> None:
        self._settings = settings
        self._model = load_causal_lm(settings.model, dtype="float32", init=settings.init, seed=settings.seed)
        torch.manual_seed(settings.seed)
        self._engine = DeepSpeedEngine(self._model, settings.engine)
        self._forward = ResponseForward(self._model, run=self._engine.forward)
        self._step = TrainStep(
            self._engine,
            self._forward,
            build_objective(settings.objective),
            rows=settings.rows,
            reduction=settings.objective.reduction,
            tokens_per_micro_batch=settings.tokens_per_micro_batch,
        )
        self._sender: WeightSender = load_object(settings.sender, field="sync.backend")(**settings.sender_kwargs)
        self.sent_bytes = 0

    def step(self, number: int, batch: Sequence[ScoredRollout]) -> StepReport:
        """Optimizer step `number`, from 1."""
        settings = self._settings
        self._model.train(settings.dropout)
        if settings.dropout:
            torch.manual_seed(settings.seed + number)  # so that a resumed run drops the same units
        return self._step(
            batch,
            learning_rate=learning_rate(
                number,
                peak=settings.learning_rate,
                schedule=settings.lr_schedule,
                warmup_steps=settings.warmup_steps,
                max_steps=settings.max_steps,
            ),
        )

    @torch.no_grad()
    def logprobs(self, rollouts: Sequence[Rollout]) -> list[list[float]]:
        """Log-probabilities of each rollout's response, at temperature 1 over all rows of the head, without dropout."""
        self._model.eval()
        packed = pack([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts], share_rows=False)
        log_p_TV = self._forward(packed).float().log_softmax(-1)
        taken_T = log_p_TV.gather(-1, packed.response_ids_T.to(log_p_TV.device).unsqueeze(-1)).squeeze(-1)
        return [part.tolist() for part in taken_T.split(list(packed.response_lengths))]

    def send_weights(self) -> Iterator[WeightUpdate]:
        """One message a bucket, for the rollout engines."""
        weights, tied = checkpoint_weights(self._model)
        self.sent_bytes = sum(tensor.nbytes for _, tensor in weights)
        yield from self._sender.send(weights, tied)

    def save(self, folder: Path) -> None:
        """Model and optimizer state, to go on from."""
        self._engine.save(folder)

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote."""
        self._engine.load(folder)

    def export(self, folder: Path) -> None:
        """The model with its tokenizer in Hugging Face format, safetensors."""
        from transformers import AutoTokenizer

        self._model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(self._settings.model).save_pretrained(folder)
