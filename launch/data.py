"""From the data that the config names to token ids that every model of the run knows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from gkd.config import Config
from gkd.config.data import DataSource
from gkd.errors import UserError
from gkd.vocabulary import tokenizer_size
from launch.hub import use_hub_or_cache
from launch.models import ModelFacts
from launch.text_data import tokenize_text
from rollout.records import Record, TeacherKeys, documents_of, read_records
from rollout.tokenized import Encoder, Limits, TeacherRoom, TokenizedData, TokenizedRecord, tokenize


def read_training(config: Config) -> list[Record]:
    """The training records of all sources, in their order.

    Raises:
        UserError: for the first thing that cannot be used.
    """
    return _read(config, "train", need_completions=config.needs_completions)


def read_held_out(config: Config) -> list[Record]:
    """The held-out records of all sources, in their order; none where the config names none.

    Raises:
        UserError: for the first thing that cannot be used.
    """
    return _read(config, "eval", need_completions=False)


def _read(config: Config, section: Literal["train", "eval"], *, need_completions: bool) -> list[Record]:
    sources = config.data.train if section == "train" else config.data.eval
    if any(source.resolved_format == "hub" and not Path(source.path).exists() for source in sources):
        use_hub_or_cache()
    return [
        record
        for number, source in enumerate(sources)
        for record in read_records(
            source,
            number=number,
            field=path_field(f"data.{section}", number, sources),
            need_completions=need_completions,
            keys=teacher_keys(config),
        )
    ]


def teacher_keys(config: Config) -> TeacherKeys:
    """What is read of the records for teachers."""
    return TeacherKeys(prompts=config.uses_teacher, routes=config.routes)


def path_field(section: str, number: int, sources: Sequence[DataSource]) -> str:
    """The config field that names a source: `data.train.path`, or with its number where there are several."""
    return f"{section}.{number}.path" if len(sources) > 1 else f"{section}.path"


def tokenize_training(
    config: Config, records: Sequence[Record], student: ModelFacts, teachers: Sequence[ModelFacts]
) -> TokenizedData:
    """The training records as token ids.

    Raises:
        UserError: if a record cannot be encoded, or nothing of a source that is needed fits.
    """
    encoder = _encoder(config, student)
    if documents := documents_of(records):
        context = _context(student, teachers)
        data = tokenize_text(config, documents, encoder, context=context, section="train")
    else:
        room = config.rollout.max_new_tokens if config.generates else 1
        data = tokenize(
            records,
            encoder,
            limits=_limits(config, student, teachers, room=room, teacher_reads=config.uses_teacher),
            student_prompts=config.generates,
            completions=config.needs_completions,
        )
    missing = set(range(len(config.data.train))) - {record.source for record in data.records}
    if config.data.weights is not None and missing:
        number = min(missing)
        raise UserError(
            path_field("data.train", number, config.data.train),
            config.data.train[number].path,
            "has a weight and no record that fits.",
            "Raise data.max_prompt_tokens, set data.overlong: truncate, or remove the source.",
        )
    return data


def tokenize_held_out(
    config: Config, records: Sequence[Record], student: ModelFacts, teachers: Sequence[ModelFacts]
) -> TokenizedData:
    """The held-out prompts that evaluation uses, as token ids; their right answers are compared as text. With the
    completions, or text, where their cross-entropy is measured.

    Raises:
        UserError: if a record cannot be encoded, nothing fits, or there is nothing to measure with.
    """
    records, encoder = records[: config.eval.limit], _encoder(config, student)
    compared = "divergence" in config.measured  # else the student alone reads them
    teachers = teachers if compared else ()
    if documents := documents_of(records):
        return tokenize_text(config, documents, encoder, context=_context(student, teachers), section="eval")
    room = config.rollout.max_new_tokens if config.asks_held_out else 1
    data = tokenize(
        records,
        encoder,
        limits=_limits(config, student, teachers, room=room, teacher_reads=compared),
        student_prompts=True,
        completions="cross_entropy" in config.measured,
    )
    _check_held_out(config, [records[record.index].answer for record in data.records], data)
    return data


def _check_held_out(config: Config, answers: Sequence[str | None], data: TokenizedData) -> None:
    """What is compared with the data's own answers needs some."""
    without = {
        "exact_match": all(answer is None for answer in answers),
        "cross_entropy": all(record.completion is None for record in data.records),
    }
    for metric in config.measured:
        if without.get(metric):
            raise UserError(
                "eval.metrics",
                config.eval.metrics,
                f"include {metric}, and no record of {config.data.eval[0].path} has a completion to compare with.",
                "Add completions, or measure the divergence alone.",
            )


def _encoder(config: Config, student: ModelFacts) -> Encoder:
    return Encoder(
        student.tokenizer,
        stop_ids=student.stop_ids,
        chat_template_kwargs=config.data.chat_template_kwargs,
        model_field="student.model",
    )


def _limits(
    config: Config, student: ModelFacts, teachers: Sequence[ModelFacts], *, room: int, teacher_reads: bool
) -> Limits:
    """What fits the models' context beside `room` response tokens."""
    context = _context(student, teachers)
    longest = context - room
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
            f"does not fit beside {room} response tokens in a context of {context} tokens.",
            f"Set it to at most {longest}.",
        )
    return Limits(
        max_prompt_tokens=limit or longest,
        max_tokens=context,
        overlong=config.data.overlong,
        field="data.max_prompt_tokens",
        teacher=_teacher_room(student, teachers, response=room) if teacher_reads else None,
    )


def _context(student: ModelFacts, teachers: Sequence[ModelFacts]) -> int:
    """Most tokens that all models read at once."""
    return min(model.context for model in (student, *teachers))


def _teacher_room(student: ModelFacts, teachers: Sequence[ModelFacts], *, response: int) -> TeacherRoom:
    """A teacher that is the student has the student's context."""
    context = min((teacher.context for teacher in teachers), default=student.context)
    return TeacherRoom(context=context, response=response)


def check_ids(
    config: Config,
    data: TokenizedData,
    student: ModelFacts,
    teachers: Sequence[ModelFacts],
    num_tokens: int,
    *,
    section: Literal["train", "eval"],
) -> None:
    """Every token that will be read, sampled or scored is one that both models know.

    `section` says which of the config's data they are of.

    Raises:
        UserError: for the largest one that is not.
    """
    known = min(num_tokens, student.head_rows, *(teacher.head_rows for teacher in teachers))
    largest, source = max((_largest_id(record), record.source) for record in data.records)
    if largest >= known:
        raise UserError(
            path_field(f"data.{section}", source, config.data.train if section == "train" else config.data.eval),
            f"token {student.tokenizer.convert_ids_to_tokens(largest)!r} (id {largest})",
            f"is beyond the {known} tokens that all models know.",
            "Use models of one family, or leave the token out of the data.",
        )
    unknown = sorted(i for i in student.stop_ids if i >= known)
    for field, teacher in zip(config.teacher_fields, teachers, strict=False):
        if not unknown or unknown[0] < min(teacher.head_rows, tokenizer_size(teacher.tokenizer)):
            continue
        raise UserError(
            f"{field}.model",
            teacher.path,
            f"does not know the student's stop token {student.tokenizer.convert_ids_to_tokens(unknown[0])!r}: rollouts "
            "could never end, and their ends could not be scored.",
            "Give the student a stop token that both have.",
        )


def _largest_id(record: TokenizedRecord) -> int:
    responses = (record.completion.response_ids,) if record.completion else ()
    return max(max(ids) for ids in (*record.prompts, *record.scored_prompts, *responses))


def teacher_notes(config: Config, data: TokenizedData) -> list[str]:
    """How many records are the teacher's in a way of their own."""
    notes = []
    inside = [field for field, t in zip(config.teacher_fields, config.all_teachers, strict=True) if not t.has_workers]
    if inside and config.objective.type == "distill" and not data.num_teacher_prompts:
        notes.append(
            f"{inside[0]} begins as the student itself and reads what the student reads: the loss begins at 0, and "
            "there is nothing to learn; give records a teacher_prompt, or the objective another term"
        )
    if data.num_teacher_prompts:
        notes.append(
            f"{data.num_teacher_prompts} of {len(data.records)} records have a prompt for the teacher alone "
            f"(up to {data.longest_scored_prompt} tokens)"
        )
    for name in config.routes:
        if not any(record.teacher == name for record in data.records):
            notes.append(f"no training record names the teacher {name}: it is loaded in vain")
    return notes


def overlong_warning(config: Config, data: TokenizedData) -> str | None:
    """What became of the overlong records; None where there are none."""
    if not data.num_overlong:
        return None
    found = f"{data.num_overlong} of {len(data.records) + data.num_dropped} records are too long"
    if config.data.overlong == "drop":
        return f"{found} and are left out (data.overlong: drop)"
    return f"{found}: {data.num_truncated} are cut, {data.num_dropped} are left out (data.overlong: truncate)"
