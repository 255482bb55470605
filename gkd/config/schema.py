"""The whole config. Its keys are fixed from the start; what a version does not build is refused in `built.py`."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from gkd.config.base import Count, NonNegativeInt, Section
from gkd.config.data import DataConfig
from gkd.config.models import StudentConfig, TeacherConfig
from gkd.config.objective import ObjectiveConfig, SftObjective
from gkd.config.rollout import RolloutConfig
from gkd.config.trainer import SyncConfig, TrainerConfig


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

    path: str
    """Import path, "package.module:function"."""
    kwargs: dict[str, Any] = {}
    """Bound to the function's keyword arguments."""


class EvalConfig(Section):
    """Evaluation while training."""

    every_steps: NonNegativeInt = 0
    """Steps between evaluations; 0 is never."""
    metrics: list[Literal["exact_match", "divergence"]] = ["exact_match", "divergence"]
    """What is measured."""
    best: str | None = None
    """Metric whose best checkpoint is kept."""


class LogConfig(Section):
    """Records beside `metrics.jsonl` and `samples.jsonl`."""

    tensorboard: bool = False
    """Write TensorBoard event files."""
    wandb: bool = False
    """Log to Weights & Biases."""
    trace: bool = False
    """Write a timeline of all workers."""
    rollouts_every: NonNegativeInt = 25
    """Steps between samples of rollouts written as text; 0 is never."""
    rollouts_kept: Count = 4
    """Rollouts written each time."""


class Config(Section):
    """One training run."""

    run: RunConfig
    student: StudentConfig
    teacher: TeacherConfig | None = None
    teachers: list[TeacherConfig] = []
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    objective: ObjectiveConfig
    reward: RewardConfig | None = None
    trainer: TrainerConfig
    sync: SyncConfig = SyncConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    stages: list[dict[str, Any]] = []

    @model_validator(mode="after")
    def parts_agree(self) -> "Config":
        """Checks that span sections."""
        if self.needs_teacher and self.teacher is None and not self.teachers:
            raise ValueError("teacher: this objective compares with a teacher: add `teacher: {model: ...}`")
        if self.sync.max_staleness == 0 and self.sync.every_steps != 1:
            raise ValueError(
                f"sync.every_steps = {self.sync.every_steps}: with `sync.max_staleness: 0` every step must sync: "
                "set every_steps to 1, or allow some staleness"
            )
        if self.trainer.batch_size % self.rollout.samples_per_prompt:
            raise ValueError(
                f"trainer.batch_size = {self.trainer.batch_size}: counts sequences, so it must be a multiple of "
                f"rollout.samples_per_prompt = {self.rollout.samples_per_prompt}"
            )
        if self.trainer.warmup_steps >= self.trainer.max_steps:
            raise ValueError(
                f"trainer.warmup_steps = {self.trainer.warmup_steps}: must be below trainer.max_steps = "
                f"{self.trainer.max_steps}"
            )
        return self

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher scores the samples."""
        return not isinstance(self.objective, SftObjective)

    @property
    def on_policy_fraction(self) -> float:
        """lambda as it takes effect: maximum likelihood learns from the dataset alone."""
        return 0.0 if isinstance(self.objective, SftObjective) else self.data.on_policy_fraction

    @property
    def needs_rollouts(self) -> bool:
        """Whether a rollout engine is started."""
        return self.on_policy_fraction > 0

    @property
    def needs_completions(self) -> bool:
        """Whether every training record must have a completion."""
        return self.on_policy_fraction < 1
