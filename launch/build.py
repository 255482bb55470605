"""From the config to the parts of a run: the only file that sees everything."""

from collections.abc import Callable
from typing import Any

from gkd.config import Config
from gkd.config.objective import Reserved
from launch.preflight import Facts
from launch.ray_session import Workers, rank_environment
from launch.run_folder import StartingPoint, run_state
from rollout.hf_teacher import TeacherSettings
from rollout.mixer import Mixer
from rollout.pipeline import NoRollouts, NoTeacher, Pipeline
from rollout.prompts import PromptStream
from rollout.rollout_actor import RolloutActor, RolloutPool
from rollout.teacher_actor import TeacherActor, TeacherPool
from rollout.vllm_generator import GeneratorSettings
from trainer.deepspeed_engine import EngineSettings
from trainer.loop import Parts, Span
from trainer.records import Records
from trainer.student import StudentSettings
from trainer.trainer_actor import Learner, TrainerActor
from trainer.weight_sync import NoSync, WeightSync

_SENDERS = {"object_store": "rollout.weights.object_store:ObjectStoreSender"}
"""Wire -> import path of the trainer's end."""


def build_parts(
    config: Config,
    facts: Facts,
    start: StartingPoint,
    workers: Workers,
    *,
    report: Callable[[dict[str, Any]], None],
    stop_requested: Callable[[], bool],
) -> Parts:
    """Start the workers and connect them. All start side by side; this returns when all are up."""
    trainer = workers.start("trainer", TrainerActor, _student_settings(config, facts), rank_environment())
    teacher = workers.start("teacher", TeacherActor, _teacher_settings(config, facts)) if facts.teacher else None
    engine = None
    if config.needs_rollouts:
        engine = workers.start("rollout", RolloutActor, _generator_settings(config, facts, on_gpu=workers.on_gpus))
    workers.wait_ready(config.rollout.timeout_s)

    learner = Learner(trainer, timeout_s=config.rollout.timeout_s)
    if start.checkpoint is not None:
        learner.load(start.checkpoint.folder)
    engines = RolloutPool(engine, timeout_s=config.rollout.timeout_s) if engine is not None else None
    return Parts(
        pipeline=Pipeline(
            _mixer(config, facts),
            engines or NoRollouts(),
            TeacherPool(teacher) if teacher is not None else NoTeacher(),
            first_step=start.completed_steps + 1,
            last_step=config.trainer.max_steps,
            max_staleness=config.sync.max_staleness,
            timeout_s=config.rollout.timeout_s,
        ),
        learner=learner,
        sync=WeightSync(learner, engines, max_gap=config.sync.max_logprob_gap) if engines else NoSync(),
        records=Records(
            config.run.output_dir,
            facts.student.tokenizer.decode,
            rollouts_every=config.log.rollouts_every,
            rollouts_kept=config.log.rollouts_kept,
            completed_steps=start.completed_steps,
        ),
        report=report,
        stop_requested=stop_requested,
    )


def build_span(config: Config, facts: Facts, start: StartingPoint) -> Span:
    """The steps of the run."""
    return Span(
        completed_steps=start.completed_steps,
        max_steps=config.trainer.max_steps,
        checkpoint_every=config.trainer.checkpoint_every,
        keep_last=config.trainer.keep_last,
        checkpoints=config.run.output_dir.absolute() / "checkpoints",
        state=run_state(config, facts.data_fingerprint),
    )


def _mixer(config: Config, facts: Facts) -> Mixer:
    return Mixer(
        PromptStream(facts.data.records, seed=config.run.seed, samples_per_prompt=config.rollout.samples_per_prompt),
        seed=config.run.seed,
        batch_size=config.trainer.batch_size,
        on_policy_fraction=config.on_policy_fraction,
        mixing=config.data.mixing,
        max_new_tokens=config.rollout.max_new_tokens,
        group_tokens=config.teacher.tokens_per_batch if config.teacher else 2**31,
        group_sequences=config.teacher.sequences_per_batch if config.teacher else 2**31,
    )


def _teacher_settings(config: Config, facts: Facts) -> TeacherSettings:
    assert config.teacher is not None and facts.teacher is not None
    return TeacherSettings(model=facts.teacher.path, dtype=config.teacher.dtype, rows=facts.rows)


def _generator_settings(config: Config, facts: Facts, *, on_gpu: bool) -> GeneratorSettings:
    shortest = sorted(facts.data.records, key=lambda record: (len(record.prompt_ids), record.index))
    return GeneratorSettings(
        model=facts.student.path,
        # The first sync brings the weights in any case; reading them from disk as well is only for models whose
        # checkpoints hold more than their trained weights.
        load_weights=config.student.init == "pretrained",
        seed=config.run.seed,
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        max_new_tokens=config.rollout.max_new_tokens,
        max_model_len=facts.max_model_len,
        max_concurrent=config.rollout.max_concurrent,
        vocabulary=facts.num_tokens,
        stop_ids=facts.stop_ids,
        probe_prompts=tuple(record.prompt_ids for record in shortest[:2]),
        on_gpu=on_gpu,
        kv_cache_gib=config.rollout.kv_cache_gib,
        gpu_memory_utilization=config.rollout.gpu_memory_utilization,
        weight_backend=_wire(config),
    )


def _wire(config: Config) -> str:
    return "object_store" if config.sync.backend == "auto" else config.sync.backend


def _student_settings(config: Config, facts: Facts) -> StudentSettings:
    trainer = config.trainer
    assert config.student.init != "truncate" and not isinstance(config.objective, Reserved)
    return StudentSettings(
        model=facts.student.path,
        init=config.student.init,
        seed=config.run.seed,
        dropout=config.student.dropout,
        rows=facts.rows,
        objective=config.objective,
        tokens_per_micro_batch=trainer.tokens_per_micro_batch,
        learning_rate=trainer.learning_rate,
        lr_schedule=trainer.lr_schedule,
        warmup_steps=trainer.warmup_steps,
        max_steps=trainer.max_steps,
        engine=EngineSettings(
            zero_stage=trainer.zero_stage,
            grad_clip=trainer.grad_clip,
            weight_decay=trainer.weight_decay,
            betas=trainer.betas,
        ),
        sender=_SENDERS[_wire(config)],
        sender_kwargs={"bucket_bytes": int(config.sync.bucket_mib * 2**20)},
    )
