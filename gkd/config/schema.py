"""The whole config. Its keys are fixed from the start; what a version does not build is refused in `built.py`."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PrivateAttr, ValidationError, ValidationInfo, model_validator

from gkd.config.base import Count, NonNegativeInt, Section
from gkd.config.data import DataConfig
from gkd.config.models import StudentConfig, TeacherConfig, Teachers
from gkd.config.objective import (
    MomentMatchingObjective,
    ObjectiveConfig,
    RlGkdObjective,
    SeqKdObjective,
    terms_of_type,
)
from gkd.config.rollout import RolloutConfig
from gkd.config.stages import StageError, Stages
from gkd.config.trainer import SyncConfig, TrainerConfig
from gkd.importing import absolute_path

LARGEST_RANK = 512
"""Largest adapter that vLLM takes."""


class RunConfig(Section):
    """The run itself."""

    name: str = Field(min_length=1)
    """Shown in the display and the records."""
    seed: NonNegativeInt = 0
    """Everything random derives from it."""
    output_dir: Path
    """The run's folder."""
    resume: str = "auto"
    """`auto`: go on from the newest good checkpoint; `never`: move an older run aside; or a checkpoint's folder."""


class RewardConfig(Section):
    """A reward function of the user's own."""

    path: Annotated[str, AfterValidator(absolute_path)]
    """Import path, "package.module:function" or "path/to/file.py:function"; the function takes (samples, **kwargs) and
    returns a finite number for each (`gkd/rewards.py`). A relative file is looked for from where the command runs."""
    kwargs: dict[str, Any] = {}
    """Bound to the function's keyword arguments."""


class EvalConfig(Section):
    """Evaluation while training."""

    every_steps: NonNegativeInt = 0
    """Steps between evaluations, of which one follows the last step, too; 0 is never."""
    metrics: list[Literal["exact_match", "divergence", "cross_entropy"]] = ["exact_match", "divergence"]
    """What is measured: greedy answers equal to the data's; mean divergence to the teacher per token, on samples; mean
    negative log-likelihood of the data's own completions or text, in nats per token (its exponential is the
    perplexity), over the vocabulary of the loss and at temperature 1. The last alone needs no rollout engine."""
    limit: Count | None = None
    """Use the first so many records of `data.eval` only."""
    best: Literal["exact_match", "divergence", "cross_entropy"] | None = None
    """Metric whose best checkpoint is kept beside the newest ones."""


class LogConfig(Section):
    """Records beside `metrics.jsonl` and `samples.jsonl`."""

    tensorboard: bool = False
    """Write TensorBoard event files."""
    wandb: bool = False
    """Reserved: logging to Weights & Biases is not built yet."""
    trace: bool = False
    """Write `trace.json`, a timeline of all workers, to open in ui.perfetto.dev: about 100 bytes for each interval."""
    rollouts_every: NonNegativeInt = 25
    """Steps between samples of rollouts written as text; 0 is never."""
    rollouts_kept: Count = 4
    """Rollouts written each time."""


_A_STAGE = "stage"
"""Validation context of a config that is one stage of a run: what concerns the whole run is not its own."""


class Config(Section):
    """One training run."""

    run: RunConfig
    student: StudentConfig
    teacher: TeacherConfig | None = None
    teachers: Teachers = []
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    objective: ObjectiveConfig
    reward: RewardConfig | None = None
    trainer: TrainerConfig
    sync: SyncConfig = SyncConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    stages: Stages = []

    _parts: tuple["Config", ...] = PrivateAttr(default=())

    @model_validator(mode="after")
    def parts_agree(self, info: ValidationInfo) -> "Config":
        """Checks that span sections; of a run with stages each stage's own."""
        if self.stages:
            self._check_stages()
        else:
            self._check_models()
            self._check_writer()
            self._check_reward()
            self._check_training()
            self._check_objective()
        if info.context != _A_STAGE:
            self._check_teachers_are_used()
            self._check_evaluation()
        return self

    def _check_stages(self) -> None:
        whole = self.model_dump(mode="json")
        parts = []
        for number, stage in enumerate(self.stages):
            try:
                parts.append(Config.model_validate(stage.applied_to(whole), context=_A_STAGE))
            except ValidationError as error:
                raise StageError(number, error) from None
        self._parts = tuple(parts)
        steps = sum(stage.steps for stage in self.stages)
        if self.trainer.max_steps > steps:
            raise ValueError(
                f"trainer.max_steps = {self.trainer.max_steps}: the stages have {steps} steps together: leave it out, "
                "or set it lower to end the run early"
            )

    def _check_models(self) -> None:
        self._check_teachers()
        lora = self.student.lora
        if lora is None:
            return
        if self.student.init == "random":
            raise ValueError(
                "student.init = random: the rollout engines read the base under an adapter from the model's folder: "
                "train all weights (remove student.lora), or use pretrained"
            )
        if lora.r > LARGEST_RANK:
            raise ValueError(
                f"student.lora.r = {lora.r}: the rollout engines take adapters of rank {LARGEST_RANK} at most: lower it"
            )

    def _check_teachers(self) -> None:
        if self.teacher is not None and self.teachers:
            raise ValueError("teachers: there is a `teacher`, too: move it into the list, or remove the list")
        if self.needs_teacher and not self.all_teachers:
            raise ValueError("teacher: this objective compares with a teacher: add `teacher: {model: ...}`")
        for field, teacher in zip(self.teacher_fields, self.all_teachers, strict=True):
            if teacher.backend == "student_base" and self.student.lora is None:
                raise ValueError(
                    f"{field}.backend = student_base: the teacher is the student with its adapter off, so the student "
                    "needs an adapter: add `student.lora: {}`, or name a teacher model"
                )
            if teacher.backend == "student_ema" and self.trainer.zero_stage == 3:
                raise ValueError(
                    f"{field}.backend = student_ema: every rank keeps the average whole, and trainer.zero_stage = 3 "
                    "gives none of them whole weights: set trainer.zero_stage to 2"
                )

    def _check_teachers_are_used(self) -> None:
        """As they are set, in some stage: a teacher may write in one and only score in another."""
        for field, teacher in zip(self.teacher_fields, self.all_teachers, strict=True):
            for name in teacher.without_use(writes=self.teacher_writes):
                raise ValueError(
                    f"{field}.{name} = {getattr(teacher, name)}: has no effect here (it is of the objective seq_kd, "
                    "or of the backend vllm): remove it"
                )

    def _check_writer(self) -> None:
        """Where the teacher writes the responses there is one that can."""
        if not self.teacher_writes:
            return
        if not self.all_teachers:
            raise ValueError("teacher: the seq_kd objective learns on its text: add `teacher: {model: ...}`")
        if len(self.all_teachers) > 1:
            raise ValueError("teachers: the seq_kd objective has one teacher, who writes: name one `teacher`")
        [field], [teacher] = self.teacher_fields, self.all_teachers
        if not teacher.has_workers:
            raise ValueError(
                f"{field}.backend = {teacher.backend}: the seq_kd objective learns on the text of a teacher with an "
                "engine of its own: set `backend: hf` and a `model`, or use the distill objective"
            )
        if self.data.on_policy_fraction not in (0, 1):
            raise ValueError(
                f"data.on_policy_fraction = {self.data.on_policy_fraction}: mixes the student's text with the "
                "dataset's, and all text of the seq_kd objective is the teacher's: remove it, or use the distill "
                "objective on answers that `gkd generate` wrote with the teacher"
            )
        if teacher.generation_temperature == 0 and self.rollout.samples_per_prompt > 1:
            raise ValueError(
                f"rollout.samples_per_prompt = {self.rollout.samples_per_prompt}: at "
                f"{field}.generation_temperature = 0 all samples of a prompt are the same: set samples_per_prompt to "
                "1, or a higher temperature"
            )

    def _check_reward(self) -> None:
        rewarded = terms_of_type(self.objective, RlGkdObjective)
        if not rewarded:
            return
        if self.reward is None:
            raise ValueError('reward: the rl_gkd objective needs one: add `reward: {path: "my_file.py:my_reward"}`')
        if len({(term.baseline, term.normalize_std) for term in rewarded}) > 1:
            raise ValueError("objective.terms: all rl_gkd terms share their advantages: give them one baseline")
        if not self.needs_rollouts:
            raise ValueError(
                "data.on_policy_fraction = 0: the rl_gkd objective learns from rewards of what the student writes: "
                "raise it, or use the distill objective"
            )
        if self.rollout.samples_per_prompt == 1 and any(term.baseline == "prompt_mean" for term in rewarded):
            raise ValueError(
                "rollout.samples_per_prompt = 1: `baseline: prompt_mean` compares the samples of a prompt: set "
                "samples_per_prompt to at least 2, or baseline to batch_mean"
            )

    def _check_training(self) -> None:
        trainer, sync = self.trainer, self.sync
        if sync.max_staleness == 0 and sync.every_steps != 1:
            raise ValueError(
                f"sync.every_steps = {sync.every_steps}: with `sync.max_staleness: 0` every step must sync: "
                "set every_steps to 1, or allow some staleness"
            )
        if sync.every_steps > sync.max_staleness + 1:
            raise ValueError(
                f"sync.every_steps = {sync.every_steps}: with sync.max_staleness = {sync.max_staleness} the prompts of "
                "the last steps before a sync would wait for that very sync: set every_steps to at most "
                f"{sync.max_staleness + 1}, or allow more staleness"
            )
        if trainer.batch_size % self.rollout.samples_per_prompt:
            raise ValueError(
                f"trainer.batch_size = {trainer.batch_size}: counts sequences, so it must be a multiple of "
                f"rollout.samples_per_prompt = {self.rollout.samples_per_prompt}"
            )
        if trainer.batch_size < trainer.num_ranks:
            raise ValueError(
                f"trainer.batch_size = {trainer.batch_size}: counts sequences over all ranks: give each of the "
                f"trainer.num_ranks = {trainer.num_ranks} at least one"
            )
        if trainer.warmup_steps >= trainer.max_steps:
            raise ValueError(
                f"trainer.warmup_steps = {trainer.warmup_steps}: must be below trainer.max_steps = {trainer.max_steps}"
            )
        needed = {"none": 0, "optimizer": 1, "all": 3}[trainer.offload]
        if trainer.zero_stage < needed:
            raise ValueError(
                f"trainer.offload = {trainer.offload}: moves what ZeRO shards: set trainer.zero_stage to at least "
                f"{needed}, or offload to none"
            )

    def _check_objective(self) -> None:
        """Every part of the objective needs text that it can learn from."""
        objective, fraction = self.objective, self.on_policy_fraction
        if self.teacher_writes:
            return
        parts = {f"`terms.{i}` of the objective": term for i, term in enumerate(getattr(objective, "terms", ()))}
        for name, part in (parts or {f"the {objective.type} objective": objective}).items():
            if fraction == 0 and not part.learns_from_dataset:
                raise ValueError(
                    f"data.on_policy_fraction = {self.data.on_policy_fraction}: {name} learns from what the student "
                    "writes alone: raise the fraction, or use the distill objective"
                )
            if fraction == 1 and not part.learns_from_student:
                raise ValueError(
                    f"data.on_policy_fraction = {self.data.on_policy_fraction}: {name} learns from the dataset's text "
                    "alone: lower the fraction, or set the term's `samples`"
                )
        for matching in terms_of_type(objective, MomentMatchingObjective):
            if fraction in (0, 1) and 0 < matching.off_policy_weight < 1:
                raise ValueError(
                    f"data.on_policy_fraction = {self.data.on_policy_fraction}: moment_matching with off_policy_weight "
                    f"= {matching.off_policy_weight:g} needs the dataset's text and the student's: set the fraction to "
                    f"0.5, or off_policy_weight to {1 - fraction:g}"
                )

    def _check_evaluation(self) -> None:
        evaluation = self.eval
        if evaluation.every_steps and not self.data.eval:
            raise ValueError(
                f"eval.every_steps = {evaluation.every_steps}: there is nothing to evaluate on: add `data.eval: "
                "{path: ...}`, or set every_steps to 0"
            )
        if evaluation.every_steps and not self.measured:
            raise ValueError(
                f"eval.metrics = {evaluation.metrics}: none can be measured here (a divergence needs a teacher): add "
                "exact_match or cross_entropy"
            )
        if evaluation.best is None:
            return
        if not evaluation.every_steps:
            raise ValueError(
                f"eval.best = {evaluation.best}: is never measured: set eval.every_steps, or leave out eval.best"
            )
        if evaluation.best not in self.measured:
            raise ValueError(
                f"eval.best = {evaluation.best}: is not measured: use one of {', '.join(self.measured)}, or add it to "
                "eval.metrics (a divergence needs a teacher)"
            )

    @property
    def parts(self) -> tuple["Config", ...]:
        """Each stage as a config of its own, as long as the stage; of a run without stages the config itself."""
        return self._parts or (self,)

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher scores the samples, in any stage."""
        return any(part.objective.needs_teacher for part in self.parts)

    @property
    def teacher_writes(self) -> bool:
        """Whether all responses are the teacher's own, written on vLLM while the run goes on; with stages, in any."""
        return any(isinstance(part.objective, SeqKdObjective) for part in self.parts)

    @property
    def uses_teacher(self) -> bool:
        """Whether there is anything for a teacher to do."""
        return self.needs_teacher or self.teacher_writes

    @property
    def on_policy_fraction(self) -> float:
        """lambda as it takes effect: some objectives learn nothing from the student's text."""
        return self.data.on_policy_fraction if self.objective.learns_from_student else 0.0

    @property
    def needs_rollouts(self) -> bool:
        """Whether the student writes samples, in any stage."""
        return any(part.on_policy_fraction > 0 for part in self.parts)

    @property
    def generates(self) -> bool:
        """Whether responses are written while the run goes on, by the student or by the teacher."""
        return self.needs_rollouts or self.teacher_writes

    @property
    def needs_completions(self) -> bool:
        """Whether every training record must have a completion; with stages, in any of them."""
        return any(part.on_policy_fraction < 1 and not part.teacher_writes for part in self.parts)

    @property
    def all_teachers(self) -> list[TeacherConfig]:
        """`teacher` or `teachers`, whichever there is."""
        return self.teachers if self.teacher is None else [self.teacher]

    @property
    def teacher_fields(self) -> list[str]:
        """For each of `all_teachers`, the section that holds it, for messages."""
        return ["teacher"] if self.teacher is not None else [f"teachers.{i}" for i in range(len(self.teachers))]

    @property
    def mixture(self) -> tuple[float, ...] | None:
        """The teachers' weights in their mixture, 1 in sum; None where they are not mixed."""
        weights = [teacher.weight for teacher in self.all_teachers if teacher.weight is not None]
        return tuple(weight / sum(weights) for weight in weights) if len(weights) > 1 else None

    @property
    def routes(self) -> tuple[str, ...]:
        """Names of the teachers of which each record has one; empty where there is no choice."""
        several = self.needs_teacher and len(self.all_teachers) > 1 and self.mixture is None
        return tuple(teacher.name for teacher in self.all_teachers) if several else ()

    @property
    def needs_teacher_workers(self) -> bool:
        """Whether teachers have workers of their own; what is made of the student is scored by the trainer."""
        return self.needs_teacher and all(teacher.has_workers for teacher in self.all_teachers)

    @property
    def asks_held_out(self) -> bool:
        """Whether evaluation has held-out prompts answered; a cross-entropy reads what is given."""
        return self.eval.every_steps > 0 and any(name != "cross_entropy" for name in self.measured)

    @property
    def needs_engine(self) -> bool:
        """Whether a rollout engine is started: to write samples, or to answer held-out prompts."""
        return self.needs_rollouts or self.asks_held_out

    @property
    def measured(self) -> list[str]:
        """What evaluation measures: of the metrics asked for, those that can be (a divergence needs a teacher)."""
        return [name for name in self.eval.metrics if name != "divergence" or self.needs_teacher]

    @property
    def max_logprob_gap(self) -> float | None:
        """`sync.max_logprob_gap`, with `auto` resolved for the trainer's precision."""
        if self.sync.max_logprob_gap == "auto":
            return 1e-3 if self.trainer.dtype == "float32" else 0.3
        return self.sync.max_logprob_gap
