"""`gkd check --offline`: checks what is on this host. Models and datasets that are not are left out, with a note."""

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from gkd.config import Config
from gkd.config.data import DataSource
from launch.architecture import read_architecture
from launch.data import path_field, teacher_keys
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
from launch.preflight import (
    Facts,
    StageFacts,
    check,
    check_settings,
    held_out_data,
    model_notes,
    settings_notes,
    stage_facts,
)
from launch.signal_cache import check_caches
from launch.sizes import Lengths, sizes_of
from launch.stages import in_each_stage, notes_of_each
from launch.text_data import block_note
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
        for field, _, source in _sources(part, "train", "eval"):
            own = bool(config.stages) and config.stages[number].sets(field)
            if not _source_is_here(source):
                absent[f"stages.{number}.{field}" if own else field] = source.path
    return absent


def _sources(config: Config, *sections: Literal["train", "eval"]) -> list[tuple[str, int, DataSource]]:
    """Field, number and source of the data of a stage."""
    of_section = {"train": config.data.train, "eval": config.data.eval}
    return [
        (path_field(f"data.{section}", number, of_section[section]), number, source)
        for section in sections
        for number, source in enumerate(of_section[section])
    ]


def _check_the_rest(config: Config, absent: Collection[str]) -> tuple[Sizes | None, list[str]]:
    """Everything that needs nothing absent; the sizes are None without the student."""
    check_settings(config)
    records, eval_records = in_each_stage(config, partial(_read, section="train")), _read(config, section="eval")
    # What is compared is compared with all teachers, so without one of them there are none.
    teachers = [] if any(field in absent for field, _ in teacher_models(config)) else read_teachers(config)
    teacher_architectures = tuple(read_architecture(teacher.path, field="teacher.model") for teacher in teachers)
    about_config = settings_notes(config)
    known = [read for read in (*records, eval_records) if read is not None]
    if len(known) > len(records) and (block := block_note(config, known)):
        about_config.append(block)
    if "student.model" in absent:
        return None, about_config
    student = read_student(config)
    num_tokens = shared_vocabulary(config, student, teachers)
    architecture, adapter, notes = check_student(config, student, this_host=False)
    check_teacher_engines(config, teachers, this_host=False)

    def found_in(part: Config, read: Sequence[Record] | None) -> StageFacts | None:
        return None if read is None else stage_facts(part, read, student, teachers, num_tokens)

    stages = in_each_stage(config, found_in, records)
    held_out = None if eval_records is None else held_out_data(config, eval_records, student, teachers, num_tokens)
    rows = shared_head_rows(student, teachers if config.needs_teacher else (), num_tokens)
    sizes = sizes_of(
        config,
        student=architecture,
        teachers=teacher_architectures,
        adapter=adapter,
        rows=rows,
        stages=[
            stage.data if stage else assumed_lengths(part) for stage, part in zip(stages, config.parts, strict=True)
        ],
        held_out=held_out,
    )
    check_caches(config, teachers, sizes.signals, rows=rows)
    about_data = notes_of_each(config, lambda _, stage: stage.notes if stage else (), stages)
    return sizes, [*notes, *about_data, *model_notes(config, student, teachers), *about_config]


def _read(config: Config, section: Literal["train", "eval"]) -> list[Record] | None:
    """The records of a section, or None where some are not here; what is here is checked."""
    records: list[Record] = []
    is_whole = True
    needed = config.needs_completions and section == "train"
    for field, number, source in _sources(config, section):
        if _source_is_here(source):
            records += read_records(
                source, number=number, field=field, need_completions=needed, keys=teacher_keys(config)
            )
        else:
            is_whole = False
    return records if is_whole else None


@dataclass(frozen=True, slots=True)
class _Assumed:
    """What is taken of data that are not here."""

    longest_prompt: int
    longest_scored_prompt: int
    longest_completion: int


def assumed_lengths(config: Config) -> Lengths:
    """Of data that are not here: prompts are taken to be as long as they may be, or else as responses."""
    responses = config.rollout.max_new_tokens
    longest = config.data.max_prompt_tokens or responses
    return _Assumed(longest, longest, max(responses, config.data.text_block_tokens or 0))


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
