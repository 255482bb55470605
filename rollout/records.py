"""Training and held-out records: what they may hold, and what is refused."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gkd.config.data import DataSource
from gkd.errors import UserError
from rollout.readers import rows

_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a record comes from."""

    field: str
    """The config field or argument that named its source, for messages."""
    place: str
    """Its file and line, or its dataset and row; both count from 1."""
    source: int
    """Number of its source in the config's list."""

    def error(self, problem: str, cure: str) -> UserError:
        """A mistake in this very record."""
        return UserError(self.field, self.place, problem, cure)


@dataclass(frozen=True, slots=True)
class TextRecord:
    """`{"prompt": str, "completion"?: str}`: read and written as it stands, without a chat template."""

    origin: Origin
    """Where it comes from."""
    prompt: str
    """What the student reads."""
    completion: str | None
    """What the dataset answers, without a stop token."""
    teacher_prompt: str | None = None
    """What the teacher reads in the prompt's place; None: the prompt."""
    teacher: str | None = None
    """Name of the teacher that scores it; None where there is no choice."""

    @property
    def answer(self) -> str | None:
        """What would be the right answer to the prompt, where the data says."""
        return self.completion

    @property
    def content(self) -> Any:
        """All that training may use of it, as JSON can hold it."""
        return [self.prompt, self.completion]


@dataclass(frozen=True, slots=True)
class ChatRecord:
    """`{"messages": [{"role": str, "content": str}, ...]}`: read and written through the model's chat template."""

    origin: Origin
    """Where it comes from."""
    messages: tuple[dict[str, Any], ...]
    """The turns, other keys that a template may read (such as tool calls) included. The first is no assistant's."""
    teacher_prompt: tuple[dict[str, Any], ...] | None = None
    """The turns that the teacher reads in the place of those before the assistant's final one; None: the same. Neither
    the first nor the last is an assistant's."""
    teacher: str | None = None
    """Name of the teacher that scores it; None where there is no choice."""

    @property
    def answer(self) -> str | None:
        """What the assistant says in the end; None where the conversation ends before that."""
        return self.messages[-1]["content"] if self.messages[-1]["role"] == "assistant" else None

    @property
    def content(self) -> Any:
        """All that training may use of it, as JSON can hold it."""
        return list(self.messages)


@dataclass(frozen=True, slots=True)
class Document:
    """`{"text": str}`: a document to learn as it stands. Nobody is asked anything."""

    origin: Origin
    """Where it comes from."""
    text: str
    """The whole of it, without an end token; where it is empty, nothing is learnt from it."""

    @property
    def answer(self) -> None:
        """Nothing would be a right answer."""
        return None

    @property
    def teacher_prompt(self) -> None:
        """The teacher reads what the student reads."""
        return None

    @property
    def teacher(self) -> None:
        """Blocks of text are scored by all teachers."""
        return None

    @property
    def content(self) -> Any:
        """All that training may use of it, as JSON can hold it."""
        return {"text": self.text}


Record = TextRecord | ChatRecord | Document


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherKeys:
    """What is read of a record for its teacher."""

    prompts: bool = False
    """Whether its teacher's own prompt is. Without a teacher nobody would read it."""
    routes: tuple[str, ...] = ()
    """Names of the teachers of which it may name one, the one that it has otherwise first; empty where there is no
    choice."""


NO_TEACHER = TeacherKeys()


def read_records(
    source: DataSource, *, number: int, field: str, need_completions: bool, keys: TeacherKeys = NO_TEACHER
) -> list[Record]:
    """Read a source.

    Args:
        source: the file, folder or dataset, and the names of its fields.
        number: its number in the config's list.
        field: the config field or argument that named it, for messages.
        need_completions: refuse records without anything that an assistant said.
        keys: what is read for teachers.

    Raises:
        UserError: for a source that cannot be read or is empty, for the first bad record, by line or row, and for a
            teacher's key that is named and in no record.
    """
    records = [
        _parse(row, source, Origin(field, place, number), need_completion=need_completions, keys=keys)
        for place, row in rows(source, field=field)
    ]
    if not records:
        raise UserError(
            field,
            source.path,
            "holds no records.",
            'Write {"prompt": ...}, {"messages": ...} or {"text": ...} each.',
        )
    name = source.teacher_prompt_field
    is_default = name == DataSource.model_fields["teacher_prompt_field"].default
    if keys.prompts and not is_default and all(record.teacher_prompt is None for record in records):
        raise UserError(
            field, source.path, f"has no record with a {name}.", "Correct teacher_prompt_field, or remove it."
        )
    return records


def documents_of(records: Sequence[Record]) -> list[Document]:
    """The records, if they are plain text; else none.

    Raises:
        UserError: if some are and some are not, naming the first that is unlike those before it.
    """
    documents = [record for record in records if isinstance(record, Document)]
    if documents and len(documents) < len(records):
        is_text = isinstance(records[0], Document)
        odd = next(record for record in records if isinstance(record, Document) != is_text)
        raise odd.origin.error(
            "has a prompt, and what comes before it is plain text."
            if is_text
            else "is plain text, and what comes before it has prompts.",
            "Use plain text alone, or prompts alone: in one file, and in all sources of a section.",
        )
    return documents


def fingerprint(records: Iterable[Record]) -> str:
    """A hash of all that the records hold and of the source that each belongs to, whatever format they came in."""
    digest = hashlib.sha256()
    for record in records:
        known = [record.origin.source, record.content]
        if record.teacher_prompt is not None or record.teacher is not None:
            known += [record.teacher_prompt, record.teacher]
        text = json.dumps(known, sort_keys=True, default=str)
        digest.update(text.encode() + b"\n")
    return digest.hexdigest()[:16]


def _parse(row: Any, source: DataSource, origin: Origin, *, need_completion: bool, keys: TeacherKeys) -> Record:
    if not isinstance(row, dict):
        raise origin.error("is no JSON object.", 'Write {"prompt": "some text"} or {"messages": [...]}.')
    teacher = _parse_route(row.get(source.teacher_field), source.teacher_field, origin, keys.routes)
    privileged = row.get(source.teacher_prompt_field) if keys.prompts else None
    messages = row.get(source.messages_field)
    if messages is not None:
        turns = _parse_messages(messages, origin, need_completion=need_completion)
        if privileged is not None:
            privileged = _parse_teacher_turns(privileged, turns, source, origin, need_completion=need_completion)
        return ChatRecord(origin, turns, privileged, teacher)
    prompt, text = row.get(source.prompt_field), row.get(source.text_field)
    if (prompt is None or prompt == "") and text is not None:
        return _parse_document(text, source, origin, has_teacher_prompt=privileged is not None)
    if prompt is None or prompt == "":
        raise origin.error(
            f"has no {source.prompt_field} and no {source.messages_field}, nor a {source.text_field}.",
            'Each record needs {"prompt": "some text"}, {"messages": [...]} or {"text": "some text"}; prompt_field, '
            "messages_field and text_field name other keys.",
        )
    completion = row.get(source.completion_field)
    texts = {
        source.prompt_field: prompt,
        source.completion_field: completion,
        source.teacher_prompt_field: privileged,
    }
    for name, value in texts.items():
        if value is not None and not isinstance(value, str):
            raise origin.error(f"has a {name} that is no text but {type(value).__name__}.", "Make it a string.")
    if completion is None and need_completion:
        raise origin.error(f"has no {source.completion_field}.", _NEEDS_COMPLETIONS)
    if privileged == "":
        raise origin.error(f"has an empty {source.teacher_prompt_field}.", _FOR_TEACHER)
    return TextRecord(origin, prompt, completion, privileged, teacher)


def _parse_document(text: Any, source: DataSource, origin: Origin, *, has_teacher_prompt: bool) -> Document:
    name = source.text_field
    if not isinstance(text, str):
        raise origin.error(f"has a {name} that is no text but {type(text).__name__}.", "Make it a string.")
    if has_teacher_prompt:
        raise origin.error(
            f"has a {source.teacher_prompt_field}, and plain text is read by the teacher as it is by the student.",
            "Leave the key out, or give a prompt and a completion.",
        )
    return Document(origin, text)


def _parse_route(name: Any, key: str, origin: Origin, routes: Sequence[str]) -> str | None:
    """The teacher that scores a record; None where there is no choice."""
    if not routes or name is None:
        return routes[0] if routes else None
    if name not in routes:
        raise origin.error(
            f"has the {key} {name!r}, which the config does not name.", f"Use one of: {', '.join(routes)}."
        )
    return str(name)


def _parse_teacher_turns(
    given: Any, turns: Sequence[dict[str, Any]], source: DataSource, origin: Origin, *, need_completion: bool
) -> tuple[dict[str, Any], ...]:
    """What a conversation's teacher reads before the assistant's final turn."""
    name = source.teacher_prompt_field
    if given == "" or not isinstance(given, str | Sequence):
        raise origin.error(f"has a {name} that is neither messages nor a text.", _FOR_TEACHER)
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
    parsed = _parse_messages(messages, origin, key=name)
    if parsed[-1]["role"] == "assistant":
        raise origin.error(f"has a {name} that ends with the assistant's turn.", _FOR_TEACHER)
    if need_completion and any(turn["role"] == "assistant" for turn in turns[:-1]):
        raise origin.error(
            f"has a {name} and several turns of the assistant that are trained on: the teacher's prompt stands for "
            "what precedes one.",
            "Split the conversation so that each record ends with its only assistant's turn, or set "
            "data.on_policy_fraction: 1.",
        )
    return parsed


def _parse_messages(
    messages: Any, origin: Origin, *, need_completion: bool = False, key: str = "messages"
) -> tuple[dict[str, Any], ...]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise origin.error(f"has {key} that are no list of turns.", _TURNS)
    prefix = "" if key == "messages" else f"{key}, "
    turns = tuple(_parse_message(turn, f"{prefix}message {i}", origin) for i, turn in enumerate(messages, start=1))
    if turns[0]["role"] == "assistant":
        raise origin.error("begins with the assistant's turn, which answers nothing.", "Put a user's turn before it.")
    if need_completion and all(turn["role"] != "assistant" for turn in turns):
        raise origin.error("has no assistant's turn.", _NEEDS_COMPLETIONS)
    return turns


def _parse_message(message: Any, name: str, origin: Origin) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise origin.error(f"{name} is no object.", _TURNS)
    if message.get("role") not in _ROLES:
        raise origin.error(f"{name} has the role {message.get('role')!r}.", f"Use one of: {', '.join(_ROLES)}.")
    if not isinstance(message.get("content"), str):
        raise origin.error(f"{name} has a content that is no text.", "Make it a string, empty if nothing was said.")
    # Columns give every message all keys, None where one does not apply; templates ask whether a key is there.
    return {key: value for key, value in message.items() if value is not None}


_FOR_TEACHER = (
    "Give the teacher a prompt to the same response (a text, or for a conversation messages that the assistant answers "
    "next), or leave the key out: then it reads what the student reads."
)
_TURNS = 'Write {"messages": [{"role": "user", "content": "some text"}, ...]}.'
_NEEDS_COMPLETIONS = "Off-policy samples are the dataset's completions: add them, or set data.on_policy_fraction: 1."
