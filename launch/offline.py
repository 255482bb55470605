"""`gkd check --offline`: checks what is on this host. Models and datasets that are not are left out, with a note."""

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from gkd.config import Config
from gkd.config.data import DataSource
from launch.architecture import read_architecture
from launch.data import check_ids, path_field, teacher_keys, tokenize_training
from launch.memory import Sizes
from launch.model_checks import (
    check_student,
    check_teacher_engines,
    read_student,
    read_teachers,
    shared_head_rows,
    shared_vocabulary,
    teacher_models,
)
from launch.models import ModelFacts
from launch.preflight import Facts, check, check_settings, data_warnings
from launch.signal_choice import choose_signals
from launch.stages import in_each_stage, notes_of_each
from rollout.records import Record, read_records


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What could be found out."""

    facts: Facts | None
    """Everything, where nothing was absent."""
    sizes: Sizes | None
    """What the memory of the workers is estimated from; None without the student."""
    notes: tuple[str, ...]
    """What was left out, and what is worth knowing of the rest."""


def check_offline(config: Config) -> Findings:
    """Check what is here, for a run that may be somewhere else: nothing is compared with this host's size.

    Raises:
        UserError: for the first thing found wrong.
    """
    absent = _absent(config)
    if not absent:
        facts = check(config, this_host=False)
        return Findings(facts=facts, sizes=facts.sizes, notes=facts.warnings)
    left_out = [f"{field} = {name!r} is not on this host: left out" for field, name in absent.items()]
    sizes, notes = _check_the_rest(config, absent.keys())
    return Findings(facts=None, sizes=sizes, notes=(*left_out, *notes))


def _absent(config: Config) -> dict[str, str]:
    """Config field -> what it names and is not on this host."""
    absent = {}
    if not _model_is_here(config.student.model):
        absent["student.model"] = config.student.model
    absent |= {field: model for field, model in teacher_models(config) if not _model_is_here(model)}
    for number, part in enumerate(config.parts):
        for field, _, source in _sources(part):
            own = bool(config.stages) and config.stages[number].sets(field)
            if not _source_is_here(source):
                absent[f"stages.{number}.{field}" if own else field] = source.path
    return absent


def _sources(config: Config) -> list[tuple[str, int, DataSource]]:
    """Field, number and source of all data of a stage."""
    return [
        (path_field(section, number, sources), number, source)
        for section, sources in (("data.train", config.data.train), ("data.eval", config.data.eval))
        for number, source in enumerate(sources)
    ]


def _check_the_rest(config: Config, absent: Collection[str]) -> tuple[Sizes | None, list[str]]:
    """Everything that needs nothing absent; the sizes are None without the student."""
    check_settings(config)
    records = in_each_stage(config, _read)
    # What is compared is compared with all teachers, so without one of them there are none.
    teachers = [] if any(field in absent for field, _ in teacher_models(config)) else read_teachers(config)
    teacher_architectures = tuple(read_architecture(teacher.path, field="teacher.model") for teacher in teachers)
    if "student.model" in absent:
        return None, []
    student = read_student(config)
    num_tokens = shared_vocabulary(config, student, teachers)
    architecture, adapter, notes = check_student(config, student, this_host=False)
    check_teacher_engines(config, teachers, this_host=False)
    found = in_each_stage(config, lambda part, read: _check_data(part, read, student, teachers, num_tokens), records)
    rows = shared_head_rows(student, teachers if config.needs_teacher else (), num_tokens)
    sizes = Sizes(
        student=architecture,
        teachers=teacher_architectures,
        adapter=adapter,
        rows=rows,
        signals=choose_signals(config, teacher_architectures, rows=rows),
        longest_prompt=max(data.longest_prompt for data in found),
        longest_scored_prompt=max(data.longest_scored_prompt for data in found),
        longest_response=max(data.longest_response for data in found),
        longest_written=max(
            (
                data.longest_scored_prompt + config.rollout.max_new_tokens
                for data, part in zip(found, config.parts, strict=True)
                if part.teacher_writes
            ),
            default=0,
        ),
    )
    return sizes, [*notes, *notes_of_each(config, lambda _, data: data.notes, found)]


def _read(config: Config) -> list[Record] | None:
    """The training records of a stage, or None where some are not here; what is here of its data is checked."""
    records: list[Record] = []
    is_whole = True
    for field, number, source in _sources(config):
        is_training = field.startswith("data.train")
        if not _source_is_here(source):
            is_whole = is_whole and not is_training
            continue
        needed = config.needs_completions and is_training
        read = read_records(source, number=number, field=field, need_completions=needed, keys=teacher_keys(config))
        records += read if is_training else []
    return records if is_whole else None


@dataclass(frozen=True, slots=True)
class _StageData:
    """What is known of the training data of a stage."""

    longest_prompt: int
    longest_scored_prompt: int
    longest_response: int
    notes: tuple[str, ...] = ()


def _check_data(
    config: Config,
    records: Sequence[Record] | None,
    student: ModelFacts,
    teachers: Sequence[ModelFacts],
    num_tokens: int,
) -> _StageData:
    if records is None:  # prompts are taken to be as long as they may be, or else as responses
        longest = config.data.max_prompt_tokens or config.rollout.max_new_tokens
        return _StageData(longest, longest, max(config.rollout.max_new_tokens, config.data.text_block_tokens or 0))
    asked = teachers if config.uses_teacher else ()
    data = tokenize_training(config, records, student, asked)
    check_ids(config, data, student, teachers, num_tokens, section="train")
    notes = data_warnings(config, student, asked, data, records)
    room = config.rollout.max_new_tokens if config.needs_engine or config.generates else 0
    return _StageData(
        longest_prompt=data.longest_prompt,
        longest_scored_prompt=data.longest_scored_prompt,
        longest_response=max(room, data.longest_completion),
        notes=tuple(note for note in notes if note),
    )


def _model_is_here(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    if Path(name).is_dir():
        return True
    return _is_repository(name) and isinstance(try_to_load_from_cache(name, "config.json"), str)


def _source_is_here(source: DataSource) -> bool:
    """Files have to be here in any case: a wrong path is a mistake wherever the run is."""
    from huggingface_hub import constants

    if source.resolved_format != "hub" or Path(source.path).exists() or not _is_repository(source.path):
        return True
    prepared = os.environ.get("HF_DATASETS_CACHE", Path(constants.HF_HOME) / "datasets")
    name = source.path.lower().replace("/", "___")
    downloaded = Path(constants.HF_HUB_CACHE) / f"datasets--{source.path.replace('/', '--')}"
    return (Path(prepared) / name).is_dir() or downloaded.is_dir()


def _is_repository(name: str) -> bool:
    """Whether this may be a name on the hub, and not a path."""
    return not name.startswith((".", "/", "~")) and name.count("/") <= 1
