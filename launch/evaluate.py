"""`gkd eval`: how often a model is right, and how far it is from its teacher."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from gkd import divergences
from gkd.config.divergence import DivergenceConfig
from gkd.errors import UserError
from gkd.evaluation import exact_match
from gkd.packing import split_by_tokens
from gkd.types import Prompt, Rollout, SampleId
from gkd.vocabulary import shared_rows, shared_tokens, tokenizer_size
from launch.model_checks import check_head_dim
from launch.models import ModelFacts, read_model
from launch.ray_session import Workers, ray_session
from launch.single_engine import (
    TIMEOUT_S,
    answers,
    engine_settings,
    places,
    read_prompts,
    response_text,
    tokenize_prompts,
)
from rollout.hf_teacher import TeacherSettings
from rollout.mixer import from_dataset
from rollout.rollout_actor import RolloutActor
from rollout.teacher_actor import TeacherActor
from trainer.evaluation_actor import EvaluationActor, EvaluationSettings

_TOKENS_PER_BATCH = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRequest:
    """What `gkd eval` was asked."""

    model: str
    """The student: folder or hub name."""
    data: Path
    """A file, a folder or the name of a Hugging Face dataset."""
    teacher: str | None
    """Folder or hub name; None measures exact match alone."""
    max_new_tokens: int
    """Length at which a response is cut."""
    temperature: float
    """Of the sampled responses; the greedy ones have none."""
    divergence: str
    """Type of the divergence to the teacher."""
    limit: int | None
    """Use the first records only."""
    seed: int
    """Of the sampled responses."""


def run_eval(request: EvalRequest, console: Console) -> dict[str, float | int | None]:
    """Measure a model.

    Returns:
        `records`, `overlong_records`, `exact_match` (greedy, over the records with a final answer),
        `divergence_on_student` (mean per token on the student's own fresh samples) and `divergence_on_dataset` (on the
        dataset's completions), each None where it does not apply, with the numbers of tokens behind them.

    Raises:
        UserError: before any worker starts, for anything that the user can mend.
    """
    divergence = _parse_divergence(request.divergence)
    records = read_prompts(request.data, limit=request.limit)
    student = read_model(request.model, field="MODEL", need_weights=True)
    check_head_dim(student, field="MODEL")
    teacher = None
    num_tokens = tokenizer_size(student.tokenizer)
    if request.teacher is not None:
        teacher = read_model(request.teacher, field="--teacher", need_weights=True)
        num_tokens = shared_tokens(student.tokenizer, teacher.tokenizer, teacher_path=teacher.path, field="--teacher")
    rows = shared_rows(student.head_rows, teacher.head_rows if teacher else None, num_tokens)
    data = tokenize_prompts(
        records,
        [student, teacher] if teacher else [student],
        max_new_tokens=request.max_new_tokens,
        completions=teacher is not None,
    )
    prompts = [
        Prompt(id=SampleId(0, r.index, 0), token_ids=r.prompt_ids, completion=r.completion) for r in data.records
    ]

    with ray_session():
        names = ["rollout", *(["teacher", "student"] if teacher else [])]
        with Workers(places(names)) as workers:
            settings = engine_settings(
                student,
                data,
                num_tokens=rows,
                max_new_tokens=request.max_new_tokens,
                temperature=request.temperature,
                top_p=1.0,
                seed=request.seed,
                dtype="float32",
                gpu_memory_utilization=0.5,  # the two models may have to share a GPU with the engine
                on_gpu=workers.on_gpus,
            )
            engine = workers.start("rollout", RolloutActor, settings)
            scorer = None
            if teacher is not None:
                scorer = _Scorer(workers, student, teacher, divergence, rows)
            with console.status(f"{request.model}: starting {', '.join(names)}"):
                workers.wait_ready(TIMEOUT_S)
            with console.status(f"{request.model}: answering {len(prompts)} prompts"):
                greedy = _all_answers(engine, prompts, temperature=0.0)
                sampled = _all_answers(engine, prompts, temperature=request.temperature) if scorer else []
            with console.status(f"{request.model}: comparing with the teacher"):
                on_student = scorer.mean(sampled) if scorer else (None, 0)
                on_dataset = (
                    scorer.mean([from_dataset(p) for p in prompts if p.completion is not None]) if scorer else (None, 0)
                )
    return {
        "records": len(data.records),
        "overlong_records": data.num_overlong,
        "exact_match": _exact_match(greedy, [records[r.index].answer for r in data.records], student),
        "divergence_on_student": on_student[0],
        "divergence_on_dataset": on_dataset[0],
        "student_tokens": on_student[1],
        "dataset_tokens": on_dataset[1],
    }


class _Scorer:
    """Teacher and student side by side, for the divergence between them."""

    def __init__(
        self, workers: Workers, student: ModelFacts, teacher: ModelFacts, divergence: DivergenceConfig, rows: int
    ) -> None:
        settings = TeacherSettings(model=teacher.path, dtype="float32", rows=rows)
        self._teacher = workers.start("teacher", TeacherActor, settings)
        measured = EvaluationSettings(model=student.path, divergence=divergence, rows=rows)
        self._student = workers.start("student", EvaluationActor, measured)

    def mean(self, rollouts: Sequence[Rollout]) -> tuple[float | None, int]:
        """Mean per response token, and the number of tokens."""
        total, count = 0.0, 0
        for group in split_by_tokens([len(r.token_ids) for r in rollouts], _TOKENS_PER_BATCH):
            members = [rollouts[i] for i in group]
            _, signals = self._teacher.score.remote(members)
            part, tokens = ray.get(self._student.divergence.remote(members, signals), timeout=TIMEOUT_S)
            total, count = total + part, count + tokens
        return (total / count if count else None), count


def _parse_divergence(kind: str) -> DivergenceConfig:
    try:
        parsed: DivergenceConfig = TypeAdapter(DivergenceConfig).validate_python({"type": kind})
    except ValidationError:
        known = ", ".join(name for name in divergences.__all__ if name != "Divergence")
        raise UserError("--divergence", kind, "is not a known type.", f"Use one of: {known}.") from None
    return parsed


def _all_answers(engine: Any, prompts: Sequence[Prompt], *, temperature: float) -> list[Rollout]:
    return [rollout for some in answers(engine, prompts, temperature=temperature) for rollout in some]


def _exact_match(rollouts: Sequence[Rollout], references: Sequence[str | None], student: ModelFacts) -> float | None:
    pairs = [
        (response_text(rollout, student), reference)
        for rollout, reference in zip(rollouts, references, strict=True)
        if reference is not None
    ]
    return exact_match([response for response, _ in pairs], [reference for _, reference in pairs]) if pairs else None
