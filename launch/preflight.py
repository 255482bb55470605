"""The checks that come before any worker starts, and the facts that they establish. Never imports vllm."""

from collections.abc import Sequence
from dataclasses import dataclass

from gkd.config import Config
from launch.architecture import read_architecture
from launch.data import (
    check_ids,
    overlong_warning,
    read_held_out,
    read_training,
    teacher_notes,
    tokenize_held_out,
    tokenize_training,
)
from launch.memory import Sizes, estimate, memory_warning
from launch.model_checks import (
    check_student,
    check_teacher_engines,
    host_has_gpu,
    read_student,
    read_teachers,
    shared_head_rows,
    shared_vocabulary,
    template_warnings,
)
from launch.models import ModelFacts
from launch.objective_needs import check_rewarded, objective_notes, records_logprobs
from launch.outputs import check_folder
from launch.placement import teacher_workers
from launch.ray_session import joins_cluster
from launch.reward_check import check_reward
from launch.signal_cache import cache_notes, check_caches
from launch.signal_choice import check_signal, signal_notes
from launch.sizes import sizes_of
from launch.stages import in_each_stage, notes_of_each
from launch.text_data import block_note, text_notes
from rollout.records import Record, fingerprint
from rollout.signal_store import CacheSettings
from rollout.tokenized import TokenizedData, TokenizedRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFacts:
    """What is known of the data of a stage."""

    data: TokenizedData
    """Training records."""
    references: tuple[str | None, ...]
    """The final answer of every training record, by its index; None where it has none."""
    fingerprint: str
    """Hash of the training records: a resumed run must train on the same."""
    notes: tuple[str, ...]
    """What is worth knowing of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a run needs to know beyond its config."""

    student: ModelFacts
    """The student."""
    teachers: tuple[ModelFacts, ...]
    """All teachers, where they are of use and models of their own; else none."""
    stages: tuple[StageFacts, ...]
    """Of each stage; a run without stages is one."""
    eval_records: list[Record]
    """Held-out records; read here so that a bad file shows before the run and not after it."""
    held_out: TokenizedData | None
    """The held-out records that evaluation uses, where the run is evaluated; their indices are those of the records."""
    num_tokens: int
    """Ids below this mean a token, the same to student and teachers."""
    rows: int
    """Vocabulary rows in the loss; no other ids are sampled, for whoever reads them need not have them."""
    stop_ids: tuple[int, ...]
    """Tokens that end a rollout."""
    answered: tuple[TokenizedRecord, ...]
    """The records whose prompts the rollout engines answer: training and held-out ones, as the run has them."""
    max_model_len: int
    """Longest of those prompts with its longest response; 0 where no engine runs."""
    sizes: Sizes
    """What the memory of the workers is estimated from."""
    caches: tuple[CacheSettings | None, ...]
    """Where the workers of each teacher keep signals of given text; None where they do not."""
    record_logprobs: bool
    """Whether the rollout engines record the sampled tokens' log-probabilities."""
    warnings: tuple[str, ...]
    """What is allowed and yet worth knowing."""

    @property
    def fingerprints(self) -> list[str]:
        """Of the stages' data."""
        return [stage.fingerprint for stage in self.stages]


def check(config: Config, *, this_host: bool = True) -> Facts:
    """Check everything that can be checked without starting a worker.

    Args:
        config: the run's.
        this_host: whether the run has to fit on this host, too.

    Raises:
        UserError: for the first thing found wrong.
    """
    check_settings(config)
    records, eval_records = in_each_stage(config, read_training), read_held_out(config)

    student, teachers = read_student(config), read_teachers(config)
    num_tokens = shared_vocabulary(config, student, teachers)
    architecture, adapter, notes = check_student(config, student, this_host=this_host)
    check_teacher_engines(config, teachers, this_host=this_host)

    stages = in_each_stage(config, lambda part, read: stage_facts(part, read, student, teachers, num_tokens), records)
    held_out = held_out_data(config, eval_records, student, teachers, num_tokens)
    by_student = [stage.data for stage, part in zip(stages, config.parts, strict=True) if part.needs_rollouts]
    asked = held_out.records if held_out and config.asks_held_out else ()
    answered = (*(record for data in by_student for record in data.records), *asked)
    rows = shared_head_rows(student, teachers if config.needs_teacher else (), num_tokens)
    teacher_architectures = tuple(read_architecture(teacher.path, field="teacher.model") for teacher in teachers)
    sizes = sizes_of(
        config,
        student=architecture,
        teachers=teacher_architectures,
        adapter=adapter,
        rows=rows,
        stages=[stage.data for stage in stages],
        held_out=held_out,
    )
    warnings = [
        *notes,
        *notes_of_each(config, lambda _, stage: stage.notes, stages),
        *model_notes(config, student, teachers),
        *settings_notes(config),
        block_note(config, [*records, eval_records]),
        *([_memory_warning(config, sizes)] if this_host else []),
    ]
    caches = check_caches(config, teachers, sizes.signals, rows=rows)
    return Facts(
        student=student,
        teachers=tuple(teachers),
        stages=tuple(stages),
        eval_records=eval_records,
        held_out=held_out,
        num_tokens=num_tokens,
        rows=rows,
        stop_ids=tuple(sorted(student.stop_ids)),
        answered=answered,
        max_model_len=max((len(record.prompt_ids) + config.rollout.max_new_tokens for record in answered), default=0),
        sizes=sizes,
        caches=caches,
        record_logprobs=any(in_each_stage(config, records_logprobs)),
        warnings=tuple(warning for warning in warnings if warning is not None),
    )


def stage_facts(
    config: Config,
    records: Sequence[Record],
    student: ModelFacts,
    teachers: Sequence[ModelFacts],
    num_tokens: int,
) -> StageFacts:
    """What is known of the data of one stage, of which `config` is the config."""
    data = tokenize_training(config, records, student, teachers if config.uses_teacher else ())
    check_ids(config, data, student, teachers, num_tokens, section="train")
    if config.reward is not None:
        check_reward(config.reward, records, data.records, student.tokenizer)
    notes = data_warnings(config, student, teachers if config.uses_teacher else (), data, records)
    return StageFacts(
        data=data,
        references=tuple(record.answer for record in records),
        fingerprint=fingerprint(records),
        notes=tuple(note for note in notes if note is not None),
    )


def held_out_data(
    config: Config,
    records: Sequence[Record],
    student: ModelFacts,
    teachers: Sequence[ModelFacts],
    num_tokens: int,
) -> TokenizedData | None:
    """The held-out records that evaluation uses, as token ids; None where the run is not evaluated.

    Raises:
        UserError: for the first thing found wrong.
    """
    if not config.eval.every_steps:
        return None
    data = tokenize_held_out(config, records, student, teachers)
    check_ids(config, data, student, teachers, num_tokens, section="eval")
    return data


def check_settings(config: Config) -> None:
    """What can be checked without models and data.

    Raises:
        UserError: for the first thing found wrong.
    """
    check_folder(config.run.output_dir, field="run.output_dir")
    check_signal(config)
    in_each_stage(config, check_rewarded)
    in_each_stage(config, records_logprobs)


def data_warnings(
    config: Config, student: ModelFacts, teachers: Sequence[ModelFacts], data: TokenizedData, records: Sequence[Record]
) -> list[str | None]:
    """What is worth knowing of the data; None where there is nothing."""
    used = len(data.records) * (config.rollout.samples_per_prompt if config.generates else 1)
    repeated = f"trainer.batch_size = {config.trainer.batch_size}: a step uses some records several times"
    return [
        overlong_warning(config, data),
        *template_warnings(config, student, teachers, records),
        *teacher_notes(config, data),
        *(text_notes(config, records) if data.block_tokens is not None else []),
        repeated if used < config.trainer.batch_size else None,
    ]


def model_notes(config: Config, student: ModelFacts, teachers: Sequence[ModelFacts]) -> list[str]:
    """What is worth knowing of the models; without `teachers`, of the student."""
    found: list[str] = []
    if config.teacher_writes and teachers and not (student.stop_ids | teachers[0].stop_ids):
        found.append("neither model has a stop token: every response will be cut at rollout.max_new_tokens")
    if not student.stop_ids and config.needs_rollouts:
        found.append("the student has no stop token: every rollout will be cut at rollout.max_new_tokens")
    rollouts = ["rollouts end at the student's"] if config.needs_rollouts or not config.teacher_writes else []
    ends = " and ".join([*rollouts, *(["what the teacher writes ends at either"] if config.teacher_writes else [])])
    for name, teacher in zip(teacher_workers(config), teachers, strict=False):
        if teacher.stop_ids != student.stop_ids:
            found.append(
                f"stop tokens differ: student {sorted(student.stop_ids)}, {name} {sorted(teacher.stop_ids)}; {ends}"
            )
    if config.needs_rollouts and config.rollout.temperature < 0.5:
        found.append(f"rollout.temperature = {config.rollout.temperature}: the student will see few of its own errors")
    if config.all_teachers and not config.uses_teacher:
        objectives = " and ".join(dict.fromkeys(f"the {part.objective.type} objective" for part in config.parts))
        found.append(
            f"{objectives} {'have' if ' and ' in objectives else 'has'} no use for a teacher: it is not loaded"
        )
    return found


def settings_notes(config: Config) -> list[str]:
    """What is worth knowing of the config alone."""
    length = _length_note(config)
    return [
        *notes_of_each(config, objective_notes),
        *signal_notes(config),
        *cache_notes(config),
        *([length] if length else []),
    ]


def _length_note(config: Config) -> str | None:
    """That a run ends before its stages do; None where it does not."""
    whole = sum(stage.steps for stage in config.stages)
    if config.trainer.max_steps >= whole:
        return None
    return f"trainer.max_steps = {config.trainer.max_steps}: the run ends there, {whole} steps are in its stages"


def _memory_warning(config: Config, sizes: Sizes) -> str | None:
    if joins_cluster() or host_has_gpu():
        return None
    return memory_warning(estimate(config, sizes, on_gpu=False))
