"""One rank's student: model, DeepSpeed engine, and everything that is asked of them.

With several ranks every method is called on all of them, in the same order: most hold a part of the weights only.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from gkd.config.divergence import DivergenceConfig
from gkd.evaluation import divergence_sum, negative_log_likelihood_sum
from gkd.head import HeadWeights
from gkd.importing import load_object
from gkd.interfaces import WeightSender, WeightUpdate
from gkd.objectives import build_divergence
from gkd.objectives.base import ObjectiveInputs
from gkd.packing import pack
from gkd.response_forward import ResponseForward
from gkd.seeds import derive_seed
from gkd.stages import ByStep, InStage, stage_seed
from gkd.trace import Lane
from gkd.types import Rollout, ScoredRollout
from trainer.deepspeed_engine import DeepSpeedEngine, EngineSettings
from trainer.ema import WeightAverage
from trainer.export import write_model
from trainer.lora import LoraSettings, adapter_off, adapter_weights, merged_weights, write_adapter
from trainer.micro_batch import MicroBatches
from trainer.share import RankShare
from trainer.stage import Stage, StageSettings
from trainer.step import StepReport
from trainer.student_model import load_student, training_mode
from trainer.teacher_source import SentSignals, StudentAsTeacher, TeacherSource
from trainer.weights import checkpoint_weights, not_sharded, tied_names

_AVERAGE = "average.pt"
"""Beside DeepSpeed's state in a checkpoint: the moving average of the weights, the same on every rank."""

Weights = Iterator[tuple[str, torch.Tensor]]
"""Names and tensors, as they leave the student."""


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
    lora: LoraSettings | None
    """The adapter that is trained; None trains all weights."""
    gradient_checkpointing: bool
    """Compute activations again in the backward pass."""
    rows: int
    """Vocabulary rows in the loss."""
    stages: ByStep[StageSettings]
    """What is minimised when, and with which learning rates."""
    base_is_teacher: bool
    """The teacher is the student's own base, its adapter off."""
    ema_decay: float | None
    """The teacher is the moving average of the student's weights, which keeps this share of itself each step; None: it
    is not."""
    engine: EngineSettings
    """DeepSpeed's part."""
    sender: str
    """Import path of the weight sender."""
    sender_kwargs: dict[str, object]
    """Its arguments."""
    bucket_bytes: int
    """Most bytes of sharded weights that are gathered at once."""


class Student:
    """Trains, scores, sends, saves and exports the student."""

    def __init__(self, settings: StudentSettings) -> None:
        self._settings = settings
        self.lane = Lane()
        """Where this rank records what it does."""
        self._model = load_student(
            settings.model,
            dtype=settings.engine.dtype,
            init=settings.init,
            seed=settings.seed,
            lora=settings.lora,
            gradient_checkpointing=settings.gradient_checkpointing,
        )
        self._base = self._model.get_base_model() if settings.lora else self._model
        torch.manual_seed(settings.seed)
        self._engine = DeepSpeedEngine(self._model, settings.engine)
        self._forward = ResponseForward(self._base, run=self._engine.forward)
        self._sent = SentSignals(rows=settings.rows, device=self._forward.device)
        self._average = None
        if settings.ema_decay is not None:
            self._average = WeightAverage(self._model, decay=settings.ema_decay)
        self._teacher = self._teacher_source()
        self._batches = MicroBatches(self._forward, self._teacher, rows=settings.rows)
        self._enter(settings.stages.at(1))
        self._sender: WeightSender = load_object(settings.sender, field="sync.backend")(**settings.sender_kwargs)
        self.sent_bytes = 0

    def _teacher_source(self) -> TeacherSource:
        rows = self._settings.rows
        if self._settings.base_is_teacher:
            return StudentAsTeacher(self._model, self._forward, partial(adapter_off, self._model), rows=rows)
        if self._average is not None:
            return StudentAsTeacher(self._model, self._forward, self._average.in_place, rows=rows)
        return self._sent

    def _enter(self, at: InStage[StageSettings]) -> None:
        """Begin a stage. One that compares with no teacher is spared the teacher that the student can be."""
        settings, batches = self._settings, self._batches
        if not at.value.objective.needs_teacher:
            batches = MicroBatches(self._forward, self._sent, rows=settings.rows)
        self._stage_number = at.stage
        seed = stage_seed(settings.seed, at.stage)
        self._stage = Stage(at.value, self._engine, batches, self.lane, seed=seed)

    def step(self, number: int, samples: Sequence[ScoredRollout], share: RankShare) -> StepReport:
        """Optimizer step `number` of the run, from 1, on this rank's share of the batch."""
        settings = self._settings
        at = settings.stages.at(number)
        if at.stage != self._stage_number:
            self._enter(at)
        training_mode(self._model, dropout=settings.dropout)
        # So that a resumed run drops the same units, and every rank others.
        torch.manual_seed(derive_seed(settings.seed, "dropout", number, self._engine.rank))
        report = self._stage.step(at.step, samples, share)
        if self._average is not None:
            self._average.update()
        return report

    @torch.no_grad()
    def logprobs(self, rollouts: Sequence[Rollout]) -> list[list[float]]:
        """Log-probabilities of each rollout's response, at temperature 1 over all rows of the head, without dropout."""
        self._model.eval()
        packed = pack([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts], share_rows=False)
        log_p_TV = self._forward(packed).float().log_softmax(-1)
        taken_T = log_p_TV.gather(-1, packed.response_ids_T.to(log_p_TV.device).unsqueeze(-1)).squeeze(-1)
        return [part.tolist() for part in taken_T.split(list(packed.response_lengths))]

    def take_heads(self, heads: Mapping[str, HeadWeights]) -> None:
        """The heads of the teachers that send hidden states, by name."""
        self._sent.take_heads(heads)

    def divergence(
        self, samples: Sequence[ScoredRollout], share: RankShare, config: DivergenceConfig, temperature: float
    ) -> tuple[float, int]:
        """Sum of a divergence to the teacher over the response tokens of all ranks' samples, and their number."""
        divergence, rows = build_divergence(config), self._settings.rows

        def measure(members: Sequence[ScoredRollout]) -> tuple[float, int]:
            view = self._teacher.view(members)
            assert view is not None, "a divergence is measured where there is a teacher"
            rollouts = [member.rollout for member in members]
            return divergence_sum(self._forward, rollouts, view, divergence, rows=rows, temperature=temperature)

        return self._summed(samples, share, measure)

    def negative_log_likelihood(self, samples: Sequence[ScoredRollout], share: RankShare) -> tuple[float, int]:
        """Sum over the response tokens of all ranks' samples in nats, and their number."""
        rows = self._settings.rows
        return self._summed(
            samples,
            share,
            lambda members: negative_log_likelihood_sum(self._forward, [m.rollout for m in members], rows=rows),
        )

    def _summed(
        self,
        samples: Sequence[ScoredRollout],
        share: RankShare,
        measure: Callable[[Sequence[ScoredRollout]], tuple[float, int]],
    ) -> tuple[float, int]:
        """Sums and numbers of tokens that `measure` finds in each forward pass, over all passes of all ranks."""
        self._model.eval()
        totals = {"sum": 0.0, "tokens": 0.0}
        for places in share.micro_batches:
            total, count = measure([samples[i] for i in places or (0,)])
            if places:  # an empty pass only keeps this rank in step with the others
                totals = {"sum": totals["sum"] + total, "tokens": totals["tokens"] + count}
        totals = self._engine.sum_over_ranks(totals)
        return totals["sum"], round(totals["tokens"])

    @torch.no_grad()
    def states(self, samples: Sequence[ScoredRollout], share: RankShare) -> list[ObjectiveInputs]:
        """What objectives see of the samples, without a graph: to measure a student with (`gkd.fresh_distance`).

        The logits are made from hidden states when they are asked for, so they are of these weights only until the
        next step. Not under ZeRO 3, where no rank has the head.
        """
        assert self._settings.engine.zero_stage < 3, "the head is whole within a forward pass alone"
        self._model.eval()
        found = []

        def keep(inputs: ObjectiveInputs, _weights_T: torch.Tensor) -> torch.Tensor:
            found.append(inputs)
            return inputs.mask_T.sum()

        for places in share.micro_batches:
            self._batches.through(samples, share, places, keep)
        return found

    def open_wire(self, workers: Sequence[int], modules: Collection[str]) -> list[dict[str, Any]]:
        """What each engine needs to know to be connected; on rank 0."""
        return self._sender.open(workers, modules)

    def connect_wire(self) -> None:
        """Connect to the engines, while they connect; on rank 0."""
        self._sender.connect()

    def send_weights(self) -> Iterator[WeightUpdate]:
        """One message a bucket, for the rollout engines; called on rank 0, while the others `follow_weights`."""
        self.sent_bytes = 0
        tied = {} if self._settings.lora else tied_names(self._base)
        yield from self._sender.send(self._counted(self._synced_weights()), tied)

    def follow_weights(self) -> None:
        """Another rank's part in `send_weights`: to help make sharded weights whole."""
        _exhaust(self._synced_weights())

    def save(self, folder: Path) -> None:
        """Model and optimizer state, to go on from, and that of what the objective and the teacher own."""
        self._engine.save(folder)
        if self._engine.rank == 0:
            self._stage.save(folder)
        if self._engine.rank == 0 and self._average is not None:
            torch.save(self._average.state_dict(), folder / _AVERAGE)

    def load(self, folder: Path, *, completed_steps: int) -> None:
        """Go on from what `save` wrote after so many optimizer steps.

        Raises:
            FileNotFoundError: if something is missing, such as what the objective of the last of these steps owns.
        """
        self._engine.load(folder)
        self._enter(self._settings.stages.at(completed_steps))
        self._stage.load(folder, device=self._forward.device)
        if self._average is not None:
            self._average.load_state_dict(torch.load(folder / _AVERAGE, map_location="cpu", weights_only=True))

    def export(self, folder: Path) -> None:
        """The model with its tokenizer in Hugging Face format, safetensors; rank 0 writes.

        With an adapter the folder is the merged model, and its subfolder `adapter` the adapter alone.
        """
        use = self._on_rank_0
        if self._settings.lora is None:
            use(self._write_model, folder, checkpoint_weights(self._base, **self._streaming))
        else:
            use(self._write_model, folder, merged_weights(self._model, **self._streaming))
            use(self._write_adapter, folder / "adapter", adapter_weights(self._model, **self._streaming))

    def _on_rank_0(self, write: Callable[[Path, Weights], None], folder: Path, weights: Weights) -> None:
        if self._engine.rank == 0:
            write(folder, weights)
        else:
            _exhaust(weights)

    def _write_model(self, folder: Path, weights: Weights) -> None:
        write_model(folder, self._base, weights, tokenizer=self._settings.model)

    def _write_adapter(self, folder: Path, weights: Weights) -> None:
        write_adapter(folder, self._model, weights)

    def _synced_weights(self) -> Weights:
        """What travels to the rollout engines: with an adapter nothing else, for they read the base themselves."""
        if self._settings.lora is None:
            return checkpoint_weights(self._base, **self._streaming)
        return adapter_weights(self._model, **self._streaming)

    @property
    def _streaming(self) -> dict[str, Any]:
        gathered = self._gathered if self._settings.engine.zero_stage == 3 else not_sharded
        return {"gathered": gathered, "bucket_bytes": self._settings.bucket_bytes}

    @contextmanager
    def _gathered(self, parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
        """The engine's `gathered`, with what the ranks send each other in the timeline."""
        with ExitStack() as whole:
            with self.lane.span("gather"):
                whole.enter_context(self._engine.gathered(parameters))
            yield

    def _counted(self, weights: Weights) -> Weights:
        for name, tensor in weights:
            self.sent_bytes += tensor.nbytes
            yield name, tensor


def _exhaust(weights: Weights) -> None:
    for _ in weights:
        pass
