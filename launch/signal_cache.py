"""What is kept of the teachers' signals: whether a folder's are the ones that this run would make, and how many."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gkd.config import Config
from gkd.errors import UserError
from gkd.signals import SPARSE, SignalKind
from gkd.types import Prompt, Rollout, SampleId
from launch.models import ModelFacts, weight_files
from launch.outputs import check_folder
from launch.signal_choice import loss_temperature
from launch.stages import compared_stage
from rollout.mixer import from_dataset
from rollout.signal_store import CacheSettings, SignalSpec, SignalStore, SpecMismatch, read_spec
from rollout.tokenized import TokenizedData

_BLOCKS = 128
_BLOCK_BYTES = 2**14
"""Of a file of weights this many blocks of at most this size are hashed, evenly spread: 2 MiB of any file."""

_MADE_BY = {
    "model": ("{field}.model", "Restore the teacher"),
    "dtype": ("{field}.dtype", "Set it back"),
    "rows": ("student.model", "Use a student of the same vocabulary"),
    "kind": ("{field}.signal", "Set it back"),
    "top_k": ("{field}.top_k", "Set it back"),
    "temperature": ("objective.temperature", "Set it back"),
    "format": ("{field}.cache", "Use the version of gkd that wrote it"),
}
"""Field of the spec -> the key of the config that decides it, and how to get back to the stored one."""


def check_caches(
    config: Config, teachers: Sequence[ModelFacts], signals: Sequence[SignalKind], *, rows: int
) -> tuple[CacheSettings | None, ...]:
    """Of each teacher with workers, where its signals are kept; None where they are not.

    Args:
        config: the run's.
        teachers: all teachers; none where they have no workers.
        signals: what each sends.
        rows: V.

    Raises:
        UserError: if a folder cannot be used, or holds signals that this run's teacher would not make.
    """
    found: list[CacheSettings | None] = []
    for field, teacher, model, kind in zip(config.teacher_fields, config.all_teachers, teachers, signals, strict=False):
        if teacher.cache is None:
            found.append(None)
            continue
        spec = SignalSpec(
            model=fingerprint(model.path),
            dtype=teacher.dtype,
            rows=rows,
            kind=kind,
            top_k=teacher.top_k if kind is SignalKind.TOP_K else None,
            temperature=loss_temperature(compared_stage(config)) if kind in SPARSE else None,
        )
        settings = CacheSettings(folder=teacher.cache.resolve(), spec=spec, teacher=teacher.name)
        _check_cache(settings, field, run_folder=config.run.output_dir.resolve())
        found.append(settings)
    return tuple(found)


def _check_cache(cache: CacheSettings, field: str, *, run_folder: Path) -> None:
    at = f"{field}.cache"
    check_folder(cache.folder, field=at)
    if cache.folder.is_relative_to(run_folder):
        raise UserError(
            at,
            str(cache.folder),
            "is in run.output_dir, which is moved aside when the run begins afresh.",
            "Name a folder outside of it.",
        )
    if run_folder.is_relative_to(cache.folder):
        raise UserError(
            at, str(cache.folder), "is around run.output_dir, and holds signals alone.", "Name a folder beside it."
        )
    try:
        stored = read_spec(cache.folder)
    except SpecMismatch as error:
        raise UserError(at, str(cache.folder), f"is no cache: {error}.", "Name another folder.") from None
    asked = asdict(cache.spec)
    if stored is None or stored == asked:
        return
    name = next(name for name in (*_MADE_BY, *stored) if stored.get(name) != asked.get(name))
    key, cure = _MADE_BY.get(name, _MADE_BY["format"])
    raise UserError(
        at,
        str(cache.folder),
        f"holds signals that this run's teacher would not make: {_said(key.format(field=field), name, stored, asked)}.",
        f"{cure}, or name another folder.",
    )


def _said(key: str, name: str, stored: dict[str, Any], asked: dict[str, Any]) -> str:
    if name == "model":
        return f"{key} is another model, or its weights changed"
    return f"{key} ({name}) was {stored.get(name)}, and is {asked.get(name)}"


def fingerprint(model: str) -> str:
    """What tells a teacher's weights from others', wherever they lie.

    It is a hash of the config and of parts of each file of weights, and of a hub's model its name and commit.
    """
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(model, "config.json")
        return f"{model}@{Path(config).parent.name}" if isinstance(config, str) else model
    digest = hashlib.blake2b((folder / "config.json").read_bytes(), digest_size=16)
    for file in sorted(weight_files(folder)):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        length = min(_BLOCK_BYTES, size // _BLOCKS + 1)
        with file.open("rb") as weights:
            for number in range(_BLOCKS):
                weights.seek(number * size // _BLOCKS)
                digest.update(weights.read(length))
    return digest.hexdigest()


def given_texts(data: TokenizedData) -> list[Rollout]:
    """The samples of the dataset that have a completion, once each."""
    return [
        from_dataset(
            Prompt(
                id=SampleId(0, record.index, 0),
                token_ids=record.prompt_ids,
                completion=record.completion,
                teacher=record.teacher,
                teacher_prompt_ids=record.teacher_prompt_ids,
            )
        )
        for record in data.records
        if record.completion is not None
    ]


def scored_texts(config: Config, stages: Sequence[TokenizedData]) -> list[Rollout]:
    """What a teacher scores of the stages' data: once, what is in them several times."""
    scored = [data for data, part in zip(stages, config.parts, strict=True) if _scores_given_text(part)]
    texts = [text for data in scored for text in given_texts(data)]
    return list({(text.teacher, text.scored_prompt_ids, text.response_ids): text for text in texts}.values())


def scores_given_text(config: Config) -> bool:
    """Whether a teacher scores text of the dataset's in any stage, which comes again."""
    return any(_scores_given_text(part) for part in config.parts)


def _scores_given_text(part: Config) -> bool:
    return part.needs_teacher and part.needs_completions


def not_stored(caches: Sequence[CacheSettings | None], texts: Sequence[Rollout]) -> list[Rollout]:
    """The samples of which a teacher's signal is not stored."""
    names = [cache.teacher for cache in caches if cache is not None]
    stores = [SignalStore(cache) for cache in caches if cache is not None]

    def stored(text: Rollout) -> bool:
        own = [store for name, store in zip(names, stores, strict=True) if text.teacher in (None, name)]
        return all(store.key(text) in store for store in own)

    return [text for text in texts if not stored(text)]


def cache_notes(config: Config) -> list[str]:
    """Where a cache is of no use."""
    if scores_given_text(config) or not config.uses_teacher:
        return []
    why = (
        "every sample that is scored is written anew, so that none comes again"
        if config.needs_teacher
        else "the teacher writes and scores nothing"
    )
    return [
        f"{field}.cache: {why}: nothing is kept"
        for field, teacher in zip(config.teacher_fields, config.all_teachers, strict=True)
        if teacher.cache is not None
    ]
