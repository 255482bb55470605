"""What is checked of the models before any worker starts. Never imports vllm."""

from collections.abc import Sequence
from functools import partial

from gkd.config import Config
from gkd.config.models import TeacherConfig
from gkd.config.objective import MomentMatchingObjective, terms_of_type
from gkd.config.rollout import RolloutConfig
from gkd.errors import UserError
from gkd.vocabulary import shared_rows, shared_tokens, tokenizer_size
from launch.architecture import Architecture
from launch.lora_check import check_lora
from launch.models import ModelFacts, read_model
from launch.self_test import self_test
from launch.stages import in_each_stage, notes_of_each
from launch.student_start import student_architecture
from rollout.chat import ChatTemplate
from rollout.records import ChatRecord, Record

_CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Attention head widths that vLLM's CPU attention supports."""


def read_student(config: Config) -> ModelFacts:
    """The student.

    Raises:
        UserError: if it cannot be read.
    """
    return read_model(config.student.model, field="student.model", need_weights=config.student.init != "random")


def read_teachers(config: Config) -> list[ModelFacts]:
    """All teachers, where they are of use and models of their own; else none.

    Raises:
        UserError: if one cannot be read.
    """
    return [read_model(model, field=field, need_weights=True) for field, model in teacher_models(config)]


def teacher_models(config: Config) -> list[tuple[str, str]]:
    """Config field and model of the teachers that workers run, to score or to write."""
    pairs = zip(config.teacher_fields, config.all_teachers, strict=True)
    models = [(f"{field}.model", teacher.model) for field, teacher in pairs if teacher.model is not None]
    return models if config.needs_teacher_workers or config.teacher_writes else []


def shared_vocabulary(config: Config, student: ModelFacts, teachers: Sequence[ModelFacts]) -> int:
    """How many leading ids mean the same token to all.

    Raises:
        UserError: if a teacher's tokenizer differs from the student's.
    """
    sizes = [
        shared_tokens(student.tokenizer, teacher.tokenizer, teacher_path=teacher.path, field=f"{field}.model")
        for field, teacher in zip(config.teacher_fields, teachers, strict=False)
    ]
    return min(sizes, default=tokenizer_size(student.tokenizer))


def shared_head_rows(student: ModelFacts, teachers: Sequence[ModelFacts], num_tokens: int) -> int:
    """Vocabulary rows in the loss."""
    smallest = min((teacher.head_rows for teacher in teachers), default=None)
    return shared_rows(student.head_rows, smallest, num_tokens)


def check_student(config: Config, student: ModelFacts, *, this_host: bool) -> tuple[Architecture, int, list[str]]:
    """Whether the student's architecture can be served, adapted and trained.

    Args:
        config: the run's.
        student: its student.
        this_host: whether this host has to serve it.

    Returns:
        Its architecture, the parameters of its adapter (0 without one), and notes.

    Raises:
        UserError: for the first thing that it cannot.
    """
    if config.needs_engine:
        check_engine(student, config.rollout, model="student.model", section="rollout", this_host=this_host)
    architecture = student_architecture(config, student)
    if config.trainer.gradient_checkpointing and not architecture.recomputes:
        raise UserError(
            "trainer.gradient_checkpointing", True, f"is unknown to {architecture.name}.", "Set it to false."
        )
    in_each_stage(config, partial(_check_critics, student, architecture))
    lora = config.student.lora
    adapter = check_lora(lora, architecture, needs_engine=config.needs_engine) if lora else 0
    return architecture, adapter, notes_of_each(config, partial(_self_test, student))


def _check_critics(student: ModelFacts, architecture: Architecture, config: Config) -> None:
    """Critics may read the last hidden states of the student, or of the teacher that it is itself."""
    for own in terms_of_type(config.objective, MomentMatchingObjective):
        if (own.reads_student or not config.needs_teacher_workers) and not architecture.head_alone:
            raise UserError(
                "student.model",
                student.path,
                f"is a {architecture.name}, whose logits are made of more than its head and its last hidden states, "
                "and the critics of moment_matching read these.",
                "Use the distill objective, or another student.",
            )


def _self_test(student: ModelFacts, config: Config) -> list[str]:
    note = self_test(student.path, config.objective, field="student.model")
    return [note] if note else []


def check_teacher_engines(config: Config, teachers: Sequence[ModelFacts], *, this_host: bool) -> None:
    """Whether vLLM can run those teachers that it has to.

    Raises:
        UserError: for the first that it cannot.
    """
    for section, own, teacher in zip(config.teacher_fields, config.all_teachers, teachers, strict=False):
        if own.on_vllm or config.teacher_writes:
            check_engine(teacher, own, model=f"{section}.model", section=section, this_host=this_host)


def check_engine(
    facts: ModelFacts, own: RolloutConfig | TeacherConfig, *, model: str, section: str, this_host: bool
) -> None:
    """Whether vLLM can run a model.

    Args:
        facts: of the model.
        own: how its engines are configured.
        model: the config field that named the model, for messages.
        section: the config section of `own`, for messages.
        this_host: whether this host has to run it.

    Raises:
        UserError: if it cannot.
    """
    gpus, heads = own.tensor_parallel_size, facts.num_heads
    if heads is not None and heads % gpus:
        fitting = ", ".join(str(size) for size in range(1, heads + 1) if heads % size == 0)
        raise UserError(
            f"{section}.tensor_parallel_size",
            gpus,
            f"does not divide the {heads} attention heads of {model}.",
            f"Use one of {fitting}.",
        )
    if this_host:
        check_head_dim(facts, field=model)


def check_head_dim(model: ModelFacts, *, field: str) -> None:
    """Refuse a model whose attention heads vLLM cannot run on this host.

    Raises:
        UserError: on hosts without GPUs, for an unsupported width.
    """
    if host_has_gpu() or model.head_dim is None or model.head_dim in _CPU_HEAD_SIZES:
        return
    raise UserError(
        field,
        model.path,
        f"has attention heads of width {model.head_dim}, which vLLM does not run on CPUs.",
        f"Use a model whose head width is one of {', '.join(map(str, _CPU_HEAD_SIZES))}.",
    )


def host_has_gpu() -> bool:
    """Whether this host has a GPU that torch may use."""
    import torch

    return torch.cuda.is_available()


def template_warnings(
    config: Config, student: ModelFacts, teachers: Sequence[ModelFacts], records: Sequence[Record]
) -> list[str]:
    """Where teachers would write a conversation of the data otherwise than the student."""
    chat = next((record for record in records if isinstance(record, ChatRecord)), None)
    if chat is None:
        return []
    found = [_template_warning(config, student, teacher, chat) for teacher in teachers]
    prefixes = [""] if len(teachers) == 1 else [f"{field}: " for field in config.teacher_fields]
    return [f"{prefix}{warning}" for prefix, warning in zip(prefixes, found, strict=False) if warning]


def _template_warning(config: Config, student: ModelFacts, teacher: ModelFacts, chat: ChatRecord) -> str | None:
    if not teacher.tokenizer.chat_template:
        return "the teacher has no chat template: it reads conversations in the student's, which it may not know"
    ours, theirs = (
        ChatTemplate(model.tokenizer, kwargs=config.data.chat_template_kwargs, model_field=field)
        for model, field in ((student, "student.model"), (teacher, "teacher.model"))
    )
    try:
        same = ours.prompt(chat) == theirs.prompt(chat)
    except UserError as error:  # the student's own template was used before
        return f"the teacher's chat template refuses {chat.origin.place} ({error.problem}); it reads the student's"
    if same:
        return None
    return (
        f"student and teacher write conversations differently (see {chat.origin.place}): the teacher reads them in the "
        "student's chat template, which it was not trained on"
    )
