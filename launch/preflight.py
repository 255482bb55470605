"""The checks that come before any worker starts, and the facts that they establish. Never imports vllm."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gkd.config import Config
from gkd.config.objective import Reserved
from gkd.errors import UserError
from gkd.objectives import build_objective
from gkd.vocabulary import shared_rows, shared_tokens, tokenizer_size
from launch.models import ModelFacts, read_model
from rollout.prompts import Record, TokenizedData, read_jsonl, tokenize

_CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Attention head widths that vLLM's CPU attention supports."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a run needs to know beyond its config."""

    student: ModelFacts
    """The student."""
    teacher: ModelFacts | None
    """The teacher, where there is one."""
    data: TokenizedData
    """Training records."""
    eval_records: list[Record]
    """Held-out records; read here so that a bad file shows before the run and not after it."""
    num_tokens: int
    """Ids below this mean a token, the same to student and teacher; no others are sampled."""
    rows: int
    """Vocabulary rows in the loss."""
    stop_ids: tuple[int, ...]
    """Tokens that end a rollout."""
    max_model_len: int
    """Longest prompt with its longest response."""
    data_fingerprint: str
    """Hash of the training file: a resumed run must train on the same."""
    warnings: tuple[str, ...]
    """What is allowed and yet worth knowing."""


def check(config: Config) -> Facts:
    """Check everything that can be checked without starting a worker.

    Raises:
        UserError: for the first thing found wrong.
    """
    _check_output(config.run.output_dir)
    _check_signal(config)
    records = read_jsonl(config.data.train.path, field="data.train.path", need_completion=config.needs_completions)
    eval_records = read_jsonl(config.data.eval.path, field="data.eval.path") if config.data.eval else []

    student = read_model(config.student.model, field="student.model", need_weights=config.student.init == "pretrained")
    teacher = None
    num_tokens = tokenizer_size(student.tokenizer)
    if config.needs_teacher and config.teacher is not None:
        teacher = read_model(config.teacher.model, field="teacher.model", need_weights=True)
        num_tokens = shared_tokens(
            student.tokenizer, teacher.tokenizer, teacher_path=teacher.path, field="teacher.model"
        )
    if config.needs_rollouts:
        check_head_dim(student, field="student.model")

    if not config.needs_completions:  # what is never used can neither be too long nor lack a stop token
        records = [Record(record.prompt, None) for record in records]
    data = _tokenize(config, records, student, teacher)
    _check_ids(data, student, teacher, num_tokens)
    response_room = config.rollout.max_new_tokens if config.needs_rollouts else 0
    return Facts(
        student=student,
        teacher=teacher,
        data=data,
        eval_records=eval_records,
        num_tokens=num_tokens,
        rows=shared_rows(student.head_rows, teacher.head_rows if teacher else None, num_tokens),
        stop_ids=tuple(sorted(student.stop_ids)),
        max_model_len=data.longest_prompt + response_room,
        data_fingerprint=hashlib.sha256(Path(config.data.train.path).read_bytes()).hexdigest()[:16],
        warnings=tuple(_warnings(config, student, teacher, data, num_records=len(records))),
    )


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


def _check_signal(config: Config) -> None:
    """The objective's parts can be imported, and the teacher gives what it requires."""
    assert not isinstance(config.objective, Reserved), "refused when the config was loaded"
    required = build_objective(config.objective).requires
    if required and config.teacher is not None and config.teacher.signal not in required:
        raise UserError(
            "teacher.signal",
            config.teacher.signal,
            f"is not what the {config.objective.type} objective requires.",
            f"Use {' or '.join(sorted(required))}.",
        )


def _check_output(folder: Path) -> None:
    if folder.resolve() == Path.cwd():
        raise UserError("run.output_dir", str(folder), "is the working directory.", "Name a folder of the run's own.")
    existing = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError("run.output_dir", str(folder), f"cannot be written: see {existing}.", "Choose another folder.")


def _check_ids(data: TokenizedData, student: ModelFacts, teacher: ModelFacts | None, num_tokens: int) -> None:
    """Every token that will be read, sampled or scored is one that both models know."""
    known = min(num_tokens, student.head_rows, teacher.head_rows if teacher else num_tokens)
    largest = max(max((*r.prompt_ids, *(r.completion_ids or ()))) for r in data.records)
    if largest >= known:
        raise UserError(
            "data.train.path",
            f"token {student.tokenizer.convert_ids_to_tokens(largest)!r} (id {largest})",
            f"is beyond the {known} tokens that all models know.",
            "Use models of one family, or leave the token out of the data.",
        )
    unknown = sorted(i for i in student.stop_ids if i >= known)
    if teacher is not None and unknown:
        raise UserError(
            "teacher.model",
            teacher.path,
            f"does not know the student's stop token {student.tokenizer.convert_ids_to_tokens(unknown[0])!r}: rollouts "
            "could never end, and their ends could not be scored.",
            "Give the student a stop token that both have.",
        )


def _tokenize(
    config: Config, records: Sequence[Record], student: ModelFacts, teacher: ModelFacts | None
) -> TokenizedData:
    context = min(model.context for model in (student, teacher) if model is not None)
    response_room = config.rollout.max_new_tokens if config.needs_rollouts else 1
    longest = context - response_room
    if longest < 1:
        raise UserError(
            "rollout.max_new_tokens",
            config.rollout.max_new_tokens,
            f"leaves no room for a prompt in a context of {context} tokens.",
            f"Set it below {context}.",
        )
    limit = config.data.max_prompt_tokens
    if limit is not None and limit > longest:
        raise UserError(
            "data.max_prompt_tokens",
            limit,
            f"does not fit beside {response_room} response tokens in a context of {context} tokens.",
            f"Set it to at most {longest}.",
        )
    return tokenize(
        records,
        student.tokenizer,
        max_prompt_tokens=limit or longest,
        max_tokens=context,
        field="data.max_prompt_tokens",
    )


def _warnings(
    config: Config, student: ModelFacts, teacher: ModelFacts | None, data: TokenizedData, *, num_records: int
) -> list[str]:
    found: list[str] = []
    if data.num_overlong:
        found.append(
            f"{data.num_overlong} of {num_records} records are too long and are left out (data.overlong: drop)"
        )
    if not student.stop_ids and config.needs_rollouts:
        found.append("the student has no stop token: every rollout will be cut at rollout.max_new_tokens")
    if teacher is not None and teacher.stop_ids != student.stop_ids:
        found.append(
            f"stop tokens differ: student {sorted(student.stop_ids)}, teacher {sorted(teacher.stop_ids)}; "
            "rollouts end at the student's"
        )
    if config.needs_rollouts and config.rollout.temperature < 0.5:
        found.append(f"rollout.temperature = {config.rollout.temperature}: the student will see few of its own errors")
    return found


def describe(config: Config, facts: Facts, places: Sequence[Any]) -> list[tuple[str, str]]:
    """What the run will do, as (name, value) pairs for a table."""
    teacher = "none" if facts.teacher is None else f"{facts.teacher.path} ({facts.teacher.head_rows:,} rows)"
    return [
        ("student", f"{facts.student.path} ({facts.student.head_rows:,} rows, {config.student.init} weights)"),
        ("teacher", teacher),
        ("vocabulary in the loss", f"{facts.rows:,} rows"),
        ("training records", f"{len(facts.data.records):,} used, {facts.data.num_overlong:,} too long"),
        ("longest prompt", f"{facts.data.longest_prompt:,} tokens"),
        ("on-policy share", f"{config.on_policy_fraction:g}"),
        ("steps", f"{config.trainer.max_steps:,} of {config.trainer.batch_size:,} sequences"),
        ("workers", ", ".join(f"{p.worker} ({p.num_cpus:g} CPU, {p.num_gpus:g} GPU)" for p in places)),
    ]
