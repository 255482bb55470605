"""The teachers of a run: their workers, and how work is given to them."""

from collections.abc import Sequence
from typing import Any

from gkd.config import Config
from gkd.config.models import TeacherConfig
from gkd.scoring import GroupLimits
from gkd.signals import SignalKind
from launch.memory import Sizes
from launch.models import ModelFacts
from launch.placement import teacher_workers
from launch.preflight import Facts
from launch.ray_session import Workers
from launch.signal_choice import loss_temperature
from launch.stages import compared_stage
from rollout.hf_teacher import TeacherSettings
from rollout.rollout_actor import RolloutActor
from rollout.teacher_actor import TeacherActor, TeacherPool
from rollout.teacher_router import MixedTeachers, Pool, RoutedTeachers
from rollout.vllm_generator import GeneratorSettings
from rollout.vllm_teacher import VllmTeacherSettings

_UNLIMITED = 2**31


def start_teachers(config: Config, facts: Facts, workers: Workers) -> list[list[Any]]:
    """Start the workers of each teacher; nothing where none has any."""
    if not config.needs_teacher_workers:
        return []
    pairs = zip(teacher_workers(config), teacher_settings(config, facts, on_gpu=workers.on_gpus), strict=True)
    return [workers.start_all(worker, TeacherActor, settings) for worker, settings in pairs]


def teacher_settings(config: Config, facts: Facts, *, on_gpu: bool) -> list[TeacherSettings | VllmTeacherSettings]:
    """Of each teacher, where they have workers."""
    found: list[TeacherSettings | VllmTeacherSettings] = []
    models = zip(config.all_teachers, facts.teachers, facts.sizes.signals, facts.caches, strict=True)
    for teacher, model, signal, cache in models:
        settings = TeacherSettings(
            name=teacher.name,
            model=model.path,
            dtype=teacher.dtype,
            rows=facts.rows,
            signal=signal,
            top_k=teacher.top_k,
            # Where the stages' temperatures differ, the signal is one that can be brought to each.
            temperature=loss_temperature(compared_stage(config)),
            cache=cache,
        )
        found.append(_on_vllm(teacher, settings, model, facts.sizes, on_gpu=on_gpu) if teacher.on_vllm else settings)
    return found


def _on_vllm(
    teacher: TeacherConfig, settings: TeacherSettings, model: ModelFacts, sizes: Sizes, *, on_gpu: bool
) -> VllmTeacherSettings:
    longest = sizes.longest_scored_prompt + sizes.longest_scored_response
    return VllmTeacherSettings(
        teacher=settings,
        # The longest prompt and the longest response need not be one sample's.
        max_model_len=min(longest, model.context),
        max_concurrent=min(teacher.max_concurrent, teacher.tokens_per_batch),
        max_step_tokens=teacher.tokens_per_batch,
        tensor_parallel_size=teacher.tensor_parallel_size,
        on_gpu=on_gpu,
        kv_cache_gib=teacher.kv_cache_gib,
        gpu_memory_utilization=teacher.gpu_memory_utilization,
    )


def start_writers(config: Config, facts: Facts, workers: Workers) -> list[Any]:
    """Start the engines with which the teacher writes; none where it does not."""
    if not config.teacher_writes:
        return []
    return workers.start_all("teacher_rollout", RolloutActor, writer_settings(config, facts, on_gpu=workers.on_gpus))


def writer_settings(config: Config, facts: Facts, *, on_gpu: bool) -> GeneratorSettings:
    """Of an engine that serves the teacher as it is on disk."""
    [teacher], [model] = config.all_teachers, facts.teachers
    known_stops = {token for token in model.stop_ids if token < facts.rows}
    return GeneratorSettings(
        model=model.path,
        load_weights=True,
        seed=config.run.seed,
        temperature=teacher.generation_temperature,
        top_p=1.0,
        max_new_tokens=config.rollout.max_new_tokens,
        max_model_len=facts.sizes.longest_written,
        max_concurrent=teacher.max_concurrent,
        dtype=teacher.dtype,
        tensor_parallel_size=teacher.tensor_parallel_size,
        adapter=None,
        vocabulary=facts.rows,
        # Where the teacher means to end its text is over, whatever the student's own mark is.
        stop_ids=tuple(sorted(known_stops.union(facts.stop_ids))),
        logprobs=False,
        probe_prompts=(),
        on_gpu=on_gpu,
        kv_cache_gib=teacher.kv_cache_gib,
        gpu_memory_utilization=teacher.gpu_memory_utilization,
        weight_backend="object_store",  # nothing travels
    )


def heads(config: Config, facts: Facts, teachers: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Handles to the heads of the teachers that send hidden states, by name."""
    of_each = zip(config.all_teachers, teachers, facts.sizes.signals, strict=False)  # none where none has workers
    return {
        teacher.name: actors[0].head.remote()
        for teacher, actors, signal in of_each
        if signal is SignalKind.HIDDEN_STATES
    }


def all_scores(config: Config, teachers: Sequence[Sequence[Any]], *, timeout_s: float) -> Pool | None:
    """The teachers' workers as one; None where there are none."""
    pools = [TeacherPool(actors, timeout_s=timeout_s) for actors in teachers]
    if len(pools) < 2:
        return pools[0] if pools else None
    if config.mixture is not None:
        return MixedTeachers(pools, config.mixture)
    return RoutedTeachers(dict(zip(config.routes, pools, strict=True)))


def scoring_limits(config: Config) -> dict[str | None, GroupLimits]:
    """Of each teacher's scoring groups; under None where every group is for all teachers, and has to suit each."""
    own = [GroupLimits(teacher.tokens_per_batch, teacher.sequences_per_batch) for teacher in config.all_teachers]
    if config.routes:
        return dict(zip(config.routes, own, strict=True))
    tokens = min((limits.tokens for limits in own), default=_UNLIMITED)
    return {None: GroupLimits(tokens, min((limits.sequences for limits in own), default=_UNLIMITED))}


def student_top_k(config: Config, facts: Facts) -> int:
    """How many of the student's most probable tokens the engines record: as many as any teacher scores."""
    if SignalKind.TOP_K not in facts.sizes.signals:
        return 0
    return max(teacher.student_top_k for teacher in config.all_teachers)


def ema_decay(config: Config) -> float | None:
    """Of the student's moving average, where that is the teacher."""
    own = [teacher.ema_decay for teacher in config.all_teachers if teacher.backend == "student_ema"]
    return own[0] if own and config.needs_teacher else None
