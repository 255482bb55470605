"""What this version builds of the schema. A later feature removes its line here."""

from gkd.config.objective import DistillObjective, Reserved
from gkd.config.schema import Config
from gkd.errors import NotBuiltYet


def refuse_unbuilt(config: Config) -> None:
    """Refuse values that the schema reserves and nothing implements.

    Raises:
        NotBuiltYet: for the first such value.
    """
    objective = config.objective
    if isinstance(objective, Reserved):
        raise NotBuiltYet("objective.type", objective.type, "Use distill or sft.")
    if isinstance(objective, DistillObjective) and isinstance(objective.divergence, Reserved):
        raise NotBuiltYet(
            "objective.divergence.type",
            objective.divergence.type,
            "Use forward_kl, reverse_kl, generalized_jsd or custom.",
        )
    teacher, trainer, rollout, sync = config.teacher, config.trainer, config.rollout, config.sync
    unbuilt: list[tuple[str, object, bool, str]] = [
        ("student.init", config.student.init, config.student.init == "truncate", "Use pretrained or random."),
        ("student.lora", config.student.lora, config.student.lora is not None, "Remove it to train all weights."),
        ("teachers", config.teachers, bool(config.teachers), "Use one `teacher`."),
        ("data.overlong", config.data.overlong, config.data.overlong != "drop", "Use drop."),
        ("rollout.num_actors", rollout.num_actors, rollout.num_actors > 1, "Use 1."),
        ("rollout.samples_per_prompt", rollout.samples_per_prompt, rollout.samples_per_prompt > 1, "Use 1."),
        ("rollout.tensor_parallel_size", rollout.tensor_parallel_size, rollout.tensor_parallel_size > 1, "Use 1."),
        ("rollout.max_restarts", rollout.max_restarts, rollout.max_restarts > 0, "Use 0."),
        ("reward", config.reward, config.reward is not None, "Remove it."),
        ("trainer.num_ranks", trainer.num_ranks, trainer.num_ranks > 1, "Use 1."),
        ("trainer.zero_stage", trainer.zero_stage, trainer.zero_stage not in (0, 2), "Use 0 or 2."),
        ("trainer.dtype", trainer.dtype, trainer.dtype != "float32", "Use float32."),
        ("sync.backend", sync.backend, sync.backend in ("nccl", "ipc"), "Use auto or object_store."),
        ("sync.max_staleness", sync.max_staleness, sync.max_staleness > 0, "Use 0 (strictly on-policy)."),
        ("eval.every_steps", config.eval.every_steps, config.eval.every_steps > 0, "Run `gkd eval` afterwards."),
        ("eval.best", config.eval.best, config.eval.best is not None, "Remove it."),
        ("log.tensorboard", config.log.tensorboard, config.log.tensorboard, "Read metrics.jsonl."),
        ("log.wandb", config.log.wandb, config.log.wandb, "Read metrics.jsonl."),
        ("log.trace", config.log.trace, config.log.trace, "Read the time/ keys of metrics.jsonl."),
        ("stages", config.stages, bool(config.stages), "Run one config after the other."),
    ]
    if teacher is not None:
        unbuilt += [
            ("teacher.backend", teacher.backend, teacher.backend != "hf", "Use hf."),
            ("teacher.signal", teacher.signal, teacher.signal != "full_logits", "Use full_logits."),
            ("teacher.num_actors", teacher.num_actors, teacher.num_actors > 1, "Use 1."),
        ]
    for field, value, refused, cure in unbuilt:
        if refused:
            raise NotBuiltYet(field, value, cure)
