"""From the config to the parts of a run: the only file that sees everything."""

from collections.abc import Callable, Sequence
from typing import Any

import ray

from gkd.config import Config
from gkd.interfaces import Rollouts, Scores
from gkd.signals import SPARSE
from gkd.stages import stage_seed
from gkd.trace import Lane
from gkd.types import Prompt, SampleId
from launch.placement import teacher_workers
from launch.preflight import Facts
from launch.ray_session import Workers
from launch.rewards import advantages_of, rewards_of, start_reward
from launch.run_folder import StartingPoint, run_state
from launch.signal_cache import given_texts
from launch.stages import by_step, compared_stage
from launch.teachers import all_scores, ema_decay, heads, scoring_limits, start_teachers, start_writers, student_top_k
from launch.trace import NoTrace, Trace
from launch.wire import wire_between
from rollout.mixer import Mixer
from rollout.pipeline import NoRollouts, NoTeacher, Pipeline
from rollout.prompts import PromptStream
from rollout.rollout_actor import RolloutActor, RolloutPool
from rollout.stages import StagedMixer, StagedRollouts, StagedTeachers
from rollout.teacher_router import Pool
from rollout.teacher_text import TeacherText
from rollout.vllm_generator import GeneratorSettings
from rollout.vllm_weights import AdapterShape
from rollout.weights.choice import Wire
from trainer.best import Best
from trainer.deepspeed_engine import EngineSettings
from trainer.evaluator import CrossEntropy, Divergence, Evaluator, ExactMatch, HeldOut, NoScores
from trainer.loop import Parts, Span
from trainer.lora import LoraSettings
from trainer.records import Records
from trainer.stage import StageSettings
from trainer.student import StudentSettings
from trainer.trainer_actor import BatchRules, Learner, TrainerActor
from trainer.weight_sync import AwaitedSync, NoSync, Sync, WeightSync, stop_the_run

_SENDERS = {
    "object_store": "rollout.weights.object_store:ObjectStoreSender",
    "nccl": "rollout.weights.nccl:NcclSender",
    "ipc": "rollout.weights.ipc:IpcSender",
}
"""Wire -> import path of the trainer's end."""


def build_parts(
    config: Config,
    facts: Facts,
    start: StartingPoint,
    workers: Workers,
    trace: Trace | NoTrace,
    *,
    report: Callable[[dict[str, Any]], None],
    warn: Callable[[str], None],
    stop_requested: Callable[[], bool],
) -> Parts:
    """Start the workers and connect them. All start side by side; this returns when all are up.

    Args:
        config: the run's.
        facts: what the preflight found.
        start: where the run begins.
        workers: places reserved for them.
        trace: records what they do.
        report: shows each step's metrics.
        warn: shows what the user should know while the run goes on.
        stop_requested: whether the user asked to stop.
    """
    wire = wire_between(config, workers.places)
    ranks = workers.start_ranks(TrainerActor, _student_settings(config, facts, wire))
    teachers = start_teachers(config, facts, workers)
    engines = (
        workers.start_all("rollout", RolloutActor, _generator_settings(config, facts, wire, on_gpu=workers.on_gpus))
        if config.needs_engine
        else []
    )
    writers = start_writers(config, facts, workers)
    reward_workers = start_reward(config, facts, workers)
    timeout_s = config.rollout.timeout_s
    workers.wait_ready(timeout_s)
    named = {"trainer": ranks, "rollout": engines, "teacher_rollout": writers, "reward": reward_workers}
    trace.follow(named | dict(zip(teacher_workers(config), teachers, strict=False)))  # no workers where none is asked
    loop = trace.lane("loop")

    learner = Learner(
        ranks,
        rules=by_step(config, [BatchRules(part.objective.reduction, advantages_of(part)) for part in config.parts]),
        tokens_per_micro_batch=config.trainer.tokens_per_micro_batch,
        timeout_s=timeout_s,
    )
    learner.take_heads(heads(config, facts, teachers))
    if start.checkpoint is not None:
        learner.load(start.checkpoint.folder, completed_steps=start.completed_steps)
    if engines:
        _connect(ranks[0], engines, gpus_per_engine=config.rollout.tensor_parallel_size, timeout_s=timeout_s)
    rollout_pool = RolloutPool(engines, max_concurrent=config.rollout.max_concurrent, timeout_s=timeout_s)
    scores = all_scores(config, teachers, timeout_s=timeout_s)
    return Parts(
        pipeline=Pipeline(
            StagedMixer(by_step(config, _mixers(config, facts))),
            _writers(config, rollout_pool, writers, first_step=start.completed_steps + 1),
            _asked(config, scores),
            rewards_of(config, facts, reward_workers),
            first_step=start.completed_steps + 1,
            last_step=config.trainer.max_steps,
            max_staleness=config.sync.max_staleness,
            timeout_s=timeout_s,
            stop_requested=stop_requested,
        ),
        learner=learner,
        sync=_sync(config, learner, rollout_pool, trace.lane("weight sync"), warn),
        evaluate=_evaluator(config, facts, rollout_pool, scores or NoScores(), learner, loop),
        records=Records(
            config.run.output_dir,
            facts.student.tokenizer.decode,
            rollouts_every=config.log.rollouts_every,
            rollouts_kept=config.log.rollouts_kept,
            completed_steps=start.completed_steps,
        ),
        report=report,
        lane=loop,
    )


def _asked(config: Config, scores: Pool | None) -> StagedTeachers:
    """The teachers in the stages that compare with them."""
    asked, none = scores or NoTeacher(), NoTeacher()
    return StagedTeachers(by_step(config, [asked if part.needs_teacher else none for part in config.parts]))


def _writers(config: Config, students: Rollouts, engines: Sequence[Any], *, first_step: int) -> StagedRollouts:
    """Who writes the samples of each stage that are not the dataset's; `engines` are the teacher's."""
    nobody: Rollouts = NoRollouts()
    teacher = nobody
    if config.teacher_writes:
        [own], timeout_s = config.all_teachers, config.rollout.timeout_s
        teacher = TeacherText(RolloutPool(engines, max_concurrent=own.max_concurrent, timeout_s=timeout_s))
    of_each = [teacher if part.teacher_writes else students if part.needs_rollouts else nobody for part in config.parts]
    return StagedRollouts(by_step(config, of_each), first_step=first_step)


def _sync(config: Config, learner: Learner, engines: RolloutPool, lane: Lane, warn: Callable[[str], None]) -> Sync:
    if not config.needs_engine:
        return NoSync()
    evaluated, awaited = _evaluated(config), _awaited(config)
    every = config.sync.every_steps
    sync = WeightSync(
        learner,
        engines,
        lane,
        due=lambda version: (awaited(version) and version % every == 0) or evaluated(version),
        max_gap=config.max_logprob_gap,
        # In float32 a gap can only be a mistake; bfloat16 rounds differently in the two engines.
        on_gap=stop_the_run if config.trainer.dtype == "float32" else _once(warn),
    )
    return AwaitedSync(sync, awaited)


def _awaited(config: Config) -> Callable[[int], bool]:
    """Whether a version lets prompts go to the engines: those of the steps up to the staleness bound after it."""
    written, ahead = by_step(config, [part.needs_rollouts for part in config.parts]), config.sync.max_staleness
    return lambda version: any(written.at(step).value for step in range(version + 1, version + ahead + 2))


def _once(warn: Callable[[str], None]) -> Callable[[str], None]:
    """Warn the first time only: the metrics show the rest."""
    warned: list[str] = []

    def first(text: str) -> None:
        if not warned:
            warn(text)
        warned.append(text)

    return first


def _evaluated(config: Config) -> Callable[[int], bool]:
    """Which steps are evaluated: every so many, and the last."""
    every, last = config.eval.every_steps, config.trainer.max_steps
    return lambda step: every > 0 and (step % every == 0 or step == last)


def _evaluator(
    config: Config, facts: Facts, engines: RolloutPool, scores: Scores, learner: Learner, lane: Lane
) -> Callable[[int], dict[str, float]]:
    measures: list[Callable[[], dict[str, float]]] = []
    if "cross_entropy" in config.measured and facts.held_out is not None:
        measures.append(CrossEntropy(given_texts(facts.held_out), learner))
    held_out = _held_out(facts) if config.asks_held_out else None
    if held_out is not None and "exact_match" in config.measured:
        stop_ids, decode = set(facts.stop_ids), facts.student.tokenizer.decode
        measures.append(ExactMatch(held_out, engines, lambda ids: decode([i for i in ids if i not in stop_ids])))
    if held_out is not None and "divergence" in config.measured:
        objective = compared_stage(config).objective
        divergence = Divergence(
            held_out,
            engines,
            scores,
            learner,
            divergence=objective.evaluated_divergence,
            temperature=config.rollout.temperature,
            # Sparse signals cannot be brought to another temperature than the loss's.
            loss_temperature=objective.temperature if SPARSE.intersection(facts.sizes.signals) else 1.0,
            limits=scoring_limits(config),
        )
        measures.append(divergence)
    return Evaluator(measures, _evaluated(config), lane)


def build_span(config: Config, facts: Facts, start: StartingPoint) -> Span:
    """The steps of the run."""
    return Span(
        completed_steps=start.completed_steps,
        max_steps=config.trainer.max_steps,
        checkpoint_every=config.trainer.checkpoint_every,
        keep_last=config.trainer.keep_last,
        checkpoints=config.run.output_dir.absolute() / "checkpoints",
        best=_best(config, start),
        state=run_state(config, facts.fingerprints),
    )


def _best(config: Config, start: StartingPoint) -> Best:
    """The best step so far, if its checkpoint is still there: a run that goes on in another folder has it no longer."""
    state = start.checkpoint.state.get("best", {}) if start.checkpoint else {}
    kept = config.run.output_dir / "checkpoints" / f"step_{state.get('step')}"
    return Best.resumed(config.eval.best, state if kept.is_dir() else {})


def _held_out(facts: Facts) -> HeldOut | None:
    if facts.held_out is None:
        return None
    records = facts.held_out.records
    return HeldOut(
        prompts=tuple(
            Prompt(
                id=SampleId(0, record.index, 0),
                token_ids=record.prompt_ids,
                teacher=record.teacher,
                teacher_prompt_ids=record.teacher_prompt_ids,
            )
            for record in records
        ),
        references=tuple(facts.eval_records[record.index].answer for record in records),
    )


def _mixers(config: Config, facts: Facts) -> list[Mixer]:
    """One for each stage. Epochs are counted on from stage to stage, so that no two samples of a run are the same."""
    mixers, first_epoch = [], 0
    for number, (part, stage) in enumerate(zip(config.parts, facts.stages, strict=True)):
        seed = stage_seed(config.run.seed, number)
        stream = PromptStream(
            stage.data.records,
            seed=seed,
            # Only what an engine writes differs between the samples of a prompt.
            samples_per_prompt=part.rollout.samples_per_prompt if part.generates else 1,
            weights=part.data.weights,
            first_epoch=first_epoch,
        )
        first_epoch = stream.epoch_after(part.trainer.max_steps * part.trainer.batch_size)
        mixers.append(
            Mixer(
                stream,
                seed=seed,
                batch_size=part.trainer.batch_size,
                # A teacher that writes does so in the student's place.
                on_policy_fraction=1.0 if part.teacher_writes else part.on_policy_fraction,
                mixing=part.data.mixing,
                max_new_tokens=part.rollout.max_new_tokens,
                limits=scoring_limits(part),
            )
        )
    return mixers


def _generator_settings(config: Config, facts: Facts, wire: Wire, *, on_gpu: bool) -> GeneratorSettings:
    lora = config.student.lora
    shortest = sorted(facts.answered, key=lambda record: (len(record.prompt_ids), record.index))
    return GeneratorSettings(
        model=facts.student.path,
        # The first sync brings the weights in any case; reading them from disk as well is only for models whose
        # checkpoints hold more than their trained weights.
        load_weights=config.student.init != "random",
        seed=config.run.seed,
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        max_new_tokens=config.rollout.max_new_tokens,
        max_model_len=facts.max_model_len,
        max_concurrent=config.rollout.max_concurrent,
        dtype=config.trainer.dtype,
        tensor_parallel_size=config.rollout.tensor_parallel_size,
        adapter=None if lora is None else AdapterShape(r=lora.r, alpha=lora.alpha),
        vocabulary=facts.rows,
        stop_ids=facts.stop_ids,
        logprobs=facts.record_logprobs,
        top_ids=student_top_k(config, facts),
        probe_prompts=tuple(record.prompt_ids for record in shortest[:2]),
        on_gpu=on_gpu,
        kv_cache_gib=config.rollout.kv_cache_gib,
        gpu_memory_utilization=config.rollout.gpu_memory_utilization,
        weight_backend=wire,
    )


def _connect(rank_0: Any, engines: Sequence[Any], *, gpus_per_engine: int, timeout_s: float) -> None:
    """Open the wire between the trainer and the engines: all join it at the same time."""
    modules = ray.get(engines[0].held_modules.remote(), timeout=timeout_s)
    infos = ray.get(rank_0.open_wire.remote([gpus_per_engine] * len(engines), modules), timeout=timeout_s)
    joining = [engine.connect_weights.remote(info) for engine, info in zip(engines, infos, strict=True)]
    ray.get([*joining, rank_0.connect_wire.remote()], timeout=timeout_s)


def _student_settings(config: Config, facts: Facts, wire: Wire) -> StudentSettings:
    trainer = config.trainer
    bucket_bytes = int(config.sync.bucket_mib * 2**20)
    return StudentSettings(
        model=facts.student.path,
        init="random" if config.student.init == "random" else "pretrained",  # a truncated one is on disk by now
        seed=config.run.seed,
        dropout=config.student.dropout,
        lora=lora_settings(config),
        gradient_checkpointing=trainer.gradient_checkpointing,
        rows=facts.rows,
        stages=by_step(config, [_stage_settings(part) for part in config.parts]),
        base_is_teacher=any(teacher.backend == "student_base" for teacher in config.all_teachers),
        ema_decay=ema_decay(config),
        engine=EngineSettings(
            zero_stage=trainer.zero_stage,
            grad_clip=trainer.grad_clip,
            weight_decay=trainer.weight_decay,
            betas=trainer.betas,
            dtype=trainer.dtype,
            offload=trainer.offload,
        ),
        sender=_SENDERS[wire],
        sender_kwargs={"bucket_bytes": bucket_bytes},
        bucket_bytes=bucket_bytes,
    )


def _stage_settings(config: Config) -> StageSettings:
    return StageSettings(
        objective=config.objective,
        learning_rate=config.trainer.learning_rate,
        lr_schedule=config.trainer.lr_schedule,
        warmup_steps=config.trainer.warmup_steps,
        steps=config.trainer.max_steps,
    )


def lora_settings(config: Config) -> LoraSettings | None:
    """The adapter that the student trains."""
    lora = config.student.lora
    if lora is None:
        return None
    targets = lora.targets if isinstance(lora.targets, str) else tuple(lora.targets)
    return LoraSettings(r=lora.r, alpha=lora.alpha, targets=targets, dropout=lora.dropout)
