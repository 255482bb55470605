"""How much memory each worker will need: an estimate from shapes, made before anything is loaded.

It says what will not fit by a wide margin and which part to make smaller; allocators, kernels and communication buffers
add to it. Legend: P parameters, n of them trained (all, or the adapter's), w bytes of a number in the worker's
precision, R ranks, T response tokens, V vocabulary rows.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

from gkd.config import Config
from gkd.config.divergence import CustomDivergence
from gkd.config.models import TeacherConfig
from gkd.config.objective import MomentMatchingObjective, SeqKdObjective, SftObjective, terms_of_type
from gkd.config.rollout import RolloutConfig
from gkd.divergences.closed_form import block_tokens
from gkd.logits import tokens_at_once
from gkd.signals import SignalKind
from launch.architecture import Architecture
from launch.placement import teacher_workers
from launch.signal_choice import signal_bytes

GIB = 2**30
NUMBER_BYTES = {"float32": 4, "bfloat16": 2}
"""Of a number in each precision."""
_ENGINE_LIBRARIES = int(0.8 * GIB)
_TORCH_LIBRARIES = int(0.5 * GIB)
_TRAINER_LIBRARIES = int(0.55 * GIB)
"""What a process holds on a CPU host with vLLM, with torch and transformers, and with DeepSpeed beside these, loaded.
Measured over runs of many sizes by `benchmarks.plan`."""
_RELOADED = 3
"""How many times an engine on a CPU host holds the largest parameter beside its weights while it takes new ones.
Measured for students of 4 to 184 M parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the estimate is made from, beside the config."""

    student: Architecture
    """The student."""
    teachers: tuple[Architecture, ...]
    """All teachers, where they are models of their own; else none."""
    adapter: int
    """Parameters of the LoRA adapter; 0 where all weights are trained."""
    rows: int
    """V: vocabulary rows in the loss."""
    signals: tuple[SignalKind, ...]
    """What the workers of each teacher send; empty where there are none."""
    longest_prompt: int
    """In tokens."""
    longest_response: int
    """In tokens, sampled or from the data."""
    longest_scored_prompt: int
    """Of the prompts whose responses teachers score, in tokens; 0 where they score none."""
    longest_scored_response: int
    """Of the responses that teachers score, in tokens; 0 where they score none."""
    longest_written: int
    """What the teacher writes with the prompt that it answers, in tokens; 0 where it writes nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """The memory of one kind of worker."""

    worker: str
    """As in `launch.placement`, or `object store`: host memory that all share."""
    num: int
    """How many there are."""
    parts: dict[str, int]
    """What for -> bytes, of each one."""

    @property
    def num_bytes(self) -> int:
        """Of each one."""
        return sum(self.parts.values())


def trained_parameters(sizes: Sizes) -> int:
    """n: the adapter's parameters, or without one all."""
    return sizes.adapter or sizes.student.num_parameters


def estimate(config: Config, sizes: Sizes, *, on_gpu: bool) -> list[Need]:
    """The memory of every worker of a run: of its GPU where there are GPUs, else of the host.

    Of each worker in the stage in which it needs most.

    Args:
        config: the run's.
        sizes: of its models and data.
        on_gpu: whether workers run on GPUs.
    """
    largest: dict[str, Need] = {}
    for part in config.parts:
        for need in _needs(part, sizes, on_gpu=on_gpu):
            if need.worker not in largest or need.num_bytes > largest[need.worker].num_bytes:
                largest[need.worker] = need
    return list(largest.values())


def _needs(config: Config, sizes: Sizes, *, on_gpu: bool) -> list[Need]:
    """Of one stage."""
    needs = [Need(worker="trainer", num=config.trainer.num_ranks, parts=_trainer(config, sizes, on_gpu=on_gpu))]
    if config.needs_engine:
        parts = _rollout(config, sizes, on_gpu=on_gpu)
        needs.append(Need(worker="rollout", num=config.rollout.num_actors, parts=parts))
    for worker, (teacher, scorer) in zip(teacher_workers(config), _scorers_of(config, sizes), strict=False):
        parts = _teacher(config, teacher, scorer, sizes, on_gpu=on_gpu)
        needs.append(Need(worker=worker, num=teacher.num_actors, parts=parts))
    if config.teacher_writes and sizes.teachers:
        [teacher], parts = config.all_teachers, _writer(config, sizes, on_gpu=on_gpu)
        needs.append(Need(worker="teacher_rollout", num=teacher.num_actors, parts=parts))
    if config.reward is not None:
        needs.append(Need(worker="reward", num=1, parts={}))  # beside what the user's function needs
    if not on_gpu:
        needs = [replace(need, parts=need.parts | {"libraries": _libraries(need)}) for need in needs]
    shared = _object_store(config, sizes, on_gpu=on_gpu)
    return [*needs, Need(worker="object store", num=1, parts=shared)] if sum(shared.values()) else needs


def _libraries(need: Need) -> int:
    if "key-value cache" in need.parts:
        return _ENGINE_LIBRARIES
    return _TRAINER_LIBRARIES if need.worker == "trainer" else _TORCH_LIBRARIES


def _trainer(config: Config, sizes: Sizes, *, on_gpu: bool) -> dict[str, int]:
    """One rank.

    - weights: P w, over R with ZeRO 3; an adapter comes on top
    - gradients: n w, over R with ZeRO 2 and 3
    - optimizer: 8 n for AdamW's two moments, over R with ZeRO 1-3
    - master weights: 4 n, over R likewise. ZeRO keeps them even where the weights are float32 already
    - activations: `_activations`, for every layer, or with gradient checkpointing for one and the layers' inputs
    - logits: 4 t V times the number of such tensors that the objective holds at once, t of the T tokens at a time, and
      those of a block of which a divergence is made
    - head's gradient: 4 V H of a bfloat16 head, which is added up in float32 and then joins the others
    - teachers' heads: V H w of each teacher that sends hidden states, in its precision, whole on every rank
    - moving average: 4 n, and n w beside it where w is not 4, whole on every rank
    - critics: 16 bytes a parameter (float32, its gradient, AdamW's moments), whole on every rank
    - weight buckets: one gathered with ZeRO 3, and on a GPU one packed; on a CPU host none is copied
    """
    trainer, student = config.trainer, sizes.student
    width, ranks = NUMBER_BYTES[trainer.dtype], trainer.num_ranks
    trained = trained_parameters(sizes)
    sharded = {stage: ranks if trainer.zero_stage >= stage else 1 for stage in (1, 2, 3)}
    positions, responses = _micro_batch(config, sizes)
    per_layer = _activations(student, positions, width)
    parts = {
        "weights": (student.num_parameters + sizes.adapter) * width // sharded[3],
        "gradients": trained * width // sharded[2],
    }
    state = {"optimizer": 8 * trained // sharded[1]}
    if trainer.zero_stage >= 1 or trainer.dtype != "float32":
        state["master weights"] = 4 * trained // sharded[1]
    if on_gpu and trainer.offload == "all":
        del parts["weights"]
    if not on_gpu or trainer.offload == "none":
        parts |= state
    if trainer.gradient_checkpointing:
        parts["activations"] = student.num_layers * positions * student.hidden_size * width + per_layer
    else:
        parts["activations"] = student.num_layers * per_layer
    device_type = "cuda" if on_gpu else "cpu"
    at_once = tokens_at_once(responses, sizes.rows, device_type)
    parts["logits"] = 4 * sizes.rows * _logit_rows(config, at_once, block_tokens(sizes.rows, device_type))
    if trainer.dtype == "bfloat16" and not sizes.adapter:
        parts["head's gradient"] = 4 * sizes.rows * student.hidden_size
    heads = sum(
        head_at_trainer(*scorer, rows=sizes.rows) * NUMBER_BYTES[teacher.dtype]
        for teacher, scorer in _scorers_of(config, sizes)
    )
    if heads:
        parts["teachers' heads"] = heads
    if config.needs_teacher and any(teacher.backend == "student_ema" for teacher in config.all_teachers):
        parts["moving average"] = trained * (4 if trainer.dtype == "float32" else 4 + width)
    matching = terms_of_type(config.objective, MomentMatchingObjective)
    if matching:
        parts["critics"] = 16 * sum(_critic_parameters(one, sizes) for one in matching)
    held = (trainer.zero_stage == 3) + on_gpu
    if config.needs_engine and held:
        largest = (sizes.adapter and width) or student.largest_parameter * width
        parts["weight buckets"] = held * max(int(config.sync.bucket_mib * 2**20), largest)
    return parts


def _micro_batch(config: Config, sizes: Sizes) -> tuple[int, int]:
    """Positions and response tokens of a rank's largest micro-batch."""
    longest = sizes.longest_prompt + sizes.longest_response
    sequences = ceil(config.trainer.batch_size / config.trainer.num_ranks)
    positions = max(longest, min(config.trainer.tokens_per_micro_batch, sequences * longest))
    return positions, min(positions, sequences * sizes.longest_response)


def _activations(model: Architecture, positions: int, width: int) -> int:
    """What one layer keeps for the backward pass: 16 numbers per hidden unit and 4 per feed-forward unit of a token.

    Measured in transformers for Llama, Qwen3 and GPT-2, to within two fifths. Attention that stores its scores needs
    more.
    """
    return positions * (16 * model.hidden_size + 4 * model.intermediate_size) * width


def _logit_rows(config: Config, tokens: int, of_block: int) -> int:
    """Float32 rows [V] at the peak of objective and backward pass, both models' logits included; measured."""
    if isinstance(config.objective, SftObjective | SeqKdObjective) and not config.objective.compares:
        return 5 * tokens
    divergence = getattr(config.objective, "divergence", None)
    if divergence is None or isinstance(divergence, CustomDivergence):
        return 14 * tokens
    return 6 * tokens + 8 * min(tokens, of_block)


def _critic_parameters(objective: MomentMatchingObjective, sizes: Sizes) -> int:
    """Of both critics, or of the one that there is."""
    teacher = sizes.teachers[0] if sizes.teachers else sizes.student  # several are of one width
    off_policy = teacher if objective.trunk == "teacher" else sizes.student
    on_policy = sizes.student if objective.trunk == "student" else teacher
    weight, rank = objective.off_policy_weight, objective.critic.rank
    widths = [off_policy.hidden_size] * (weight > 0) + [on_policy.hidden_size] * (weight < 1)
    return sum(sizes.rows * width if rank is None else rank * (sizes.rows + width) for width in widths)


def _rollout(config: Config, sizes: Sizes, *, on_gpu: bool) -> dict[str, int]:
    """One GPU of an engine of the student's, or one engine on a CPU host, which reloads weights beside those it has."""
    student = replace(sizes.student, num_parameters=sizes.student.num_parameters + sizes.adapter)
    longest = sizes.longest_prompt + sizes.longest_response
    parts = _engine(config, config.rollout, student, dtype=config.trainer.dtype, longest=longest, on_gpu=on_gpu)
    if on_gpu or sizes.adapter:
        return parts
    return parts | {"reloading": _RELOADED * student.largest_parameter * NUMBER_BYTES[config.trainer.dtype]}


def _writer(config: Config, sizes: Sizes, *, on_gpu: bool) -> dict[str, int]:
    """The same of a teacher that writes."""
    [teacher], longest = config.all_teachers, sizes.longest_written
    return _engine(config, teacher, sizes.teachers[0], dtype=teacher.dtype, longest=longest, on_gpu=on_gpu)


def _engine(
    config: Config, own: RolloutConfig | TeacherConfig, model: Architecture, *, dtype: str, longest: int, on_gpu: bool
) -> dict[str, int]:
    """One GPU of an engine that writes responses, or one engine on a CPU host.

    - weights: P w, over the GPUs of the engine
    - key-value cache: on a CPU host as configured. On a GPU, where the engine takes `gpu_memory_utilization` in any
      case, what its share of the prompts in flight needs at full length
    """
    width, gpus = NUMBER_BYTES[dtype], own.tensor_parallel_size
    weights = model.num_parameters * width // gpus
    if not on_gpu:
        return {"weights": weights, "key-value cache": int(own.kv_cache_gib * GIB)}
    in_flight = config.trainer.batch_size * (1 + config.sync.max_staleness)
    sequences = min(own.max_concurrent, ceil(in_flight / own.num_actors))
    return {
        "weights": weights,
        "key-value cache": sequences * longest * model.cache_numbers_per_token * width // gpus,
    }


Scorer = tuple[Architecture, SignalKind]
"""A teacher and what its workers send."""


def _scorers_of(config: Config, sizes: Sizes) -> list[tuple[TeacherConfig, Scorer]]:
    """Every teacher that has workers of its own."""
    return list(zip(config.all_teachers, zip(sizes.teachers, sizes.signals, strict=False), strict=False))


def head_at_trainer(model: Architecture, signal: SignalKind, *, rows: int) -> int:
    """Parameters of a teacher's head that the trainer applies: V H, and 0 unless the teacher sends hidden states."""
    return rows * model.hidden_size if signal is SignalKind.HIDDEN_STATES else 0


def _teacher(config: Config, teacher: TeacherConfig, scorer: Scorer, sizes: Sizes, *, on_gpu: bool) -> dict[str, int]:
    """One worker of a teacher, or one GPU of one on vLLM.

    - weights: P w, over the GPUs
    - key-value cache: of vLLM alone. As configured on a CPU host, else what the largest batch needs, over the GPUs
    - activations: `_activations` of one layer, since nothing is kept for a backward pass
    - signals: of T tokens, twice: as computed and as sent
    """
    width, gpus = NUMBER_BYTES[teacher.dtype], teacher.tensor_parallel_size if teacher.on_vllm else 1
    positions, responses = _scoring_batch(config, teacher, sizes)
    parts = {"weights": scorer[0].num_parameters * width // gpus}
    if teacher.on_vllm:
        needed = positions * scorer[0].cache_numbers_per_token * width // gpus
        parts["key-value cache"] = needed if on_gpu else int(teacher.kv_cache_gib * GIB)
    return parts | {
        "activations": _activations(scorer[0], positions, width),
        "signals": 2 * responses * _signal_bytes(teacher, scorer, sizes),
    }


def _scoring_batch(config: Config, teacher: TeacherConfig, sizes: Sizes) -> tuple[int, int]:
    """Positions and response tokens of a teacher's largest batch."""
    longest = sizes.longest_scored_prompt + sizes.longest_scored_response
    sequences = min(teacher.sequences_per_batch, config.trainer.batch_size)
    positions = max(longest, min(teacher.tokens_per_batch, sequences * longest))
    return positions, min(positions, sequences * sizes.longest_scored_response)


def _signal_bytes(teacher: TeacherConfig, scorer: Scorer, sizes: Sizes) -> int:
    """Of one token."""
    return signal_bytes(scorer[1], teacher, rows=sizes.rows, hidden_size=scorer[0].hidden_size)


def _object_store(config: Config, sizes: Sizes, *, on_gpu: bool) -> dict[str, int]:
    """Host memory that is nobody's own.

    - weights on their way: one version, P w or the adapter, unless they go from GPU to GPU
    - teacher signals: of every batch in the window, which is 1 + max_staleness
    - offloaded: what the trainer's ranks keep in host memory
    """
    parts: dict[str, int] = {}
    trainer, width = config.trainer, NUMBER_BYTES[config.trainer.dtype]
    trained = trained_parameters(sizes)
    through_the_host = not on_gpu or sizes.adapter or config.sync.backend == "object_store"
    if config.needs_engine and through_the_host:
        parts["weights on their way"] = trained * width
    each = [_signal_bytes(teacher, scorer, sizes) for teacher, scorer in _scorers_of(config, sizes)]
    if each:
        tokens = trainer.batch_size * (1 + config.sync.max_staleness) * sizes.longest_scored_response
        # A token has a signal from every teacher of a mixture, else from one.
        parts["teacher signals"] = tokens * (sum(each) if config.mixture else max(each))
    if on_gpu and trainer.offload != "none":
        parts["offloaded"] = 12 * trained + (sizes.student.num_parameters * width if trainer.offload == "all" else 0)
    return parts


def memory_warning(needs: Sequence[Need]) -> str | None:
    """Where a CPU host has not the memory that all workers need together; None where it has."""
    needed, free = sum(need.num * need.num_bytes for need in needs), available_memory()
    if needed <= free:
        return None
    need = max(needs, key=lambda need: need.num * need.num_bytes)
    part = max(need.parts, key=lambda part: need.parts[part])
    return (
        f"the workers need about {needed / GIB:.1f} GiB and this host has {free / GIB:.1f} GiB free; most of it is for "
        f"the {part} of the {need.worker} ({need.num * need.parts[part] / GIB:.1f} GiB)"
    )


def available_memory() -> int:
    """Bytes that this host can still give: its free memory, and what a container's limit leaves."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    cgroup = Path("/sys/fs/cgroup")
    try:
        limit = (cgroup / "memory.max").read_text(encoding="ascii").strip()
        used = int((cgroup / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):  # no cgroup of version 2: no limit to be read
        return free
    return free if limit == "max" else min(free, max(0, int(limit) - used))
