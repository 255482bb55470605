"""Records as token ids, each within the lengths that a run allows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gkd.errors import UserError
from gkd.types import Completion
from rollout.chat import ChatTemplate, to_completion
from rollout.records import ChatRecord, Record, TextRecord

Ids = tuple[int, ...]

_DOCUMENTS_AT_ONCE = 256
"""Documents that are tokenised together: a tokenizer holds much beside the ids."""


@dataclass(frozen=True, slots=True)
class TokenizedRecord:
    """A record as token ids."""

    index: int
    """Its place in the data, over all sources in their order; blank lines are not counted."""
    prompt_ids: Ids
    """What the student is asked."""
    completion: Completion | None
    """What the dataset answers, where the record has that."""
    source: int = 0
    """Number of its source in the config's list."""
    teacher: str | None = None
    """Name of the teacher that scores it; None where there is no choice."""
    teacher_prompt_ids: Ids | None = None
    """What the teacher is asked in the student's place; None: the same."""

    @property
    def prompts(self) -> tuple[Ids, ...]:
        """What the student is asked, and what the completion answers to: of a conversation these may differ."""
        return (self.prompt_ids,) if self.completion is None else (self.prompt_ids, self.completion.prompt_ids)

    @property
    def scored_prompts(self) -> tuple[Ids, ...]:
        """What the teacher reads before a response."""
        return self.prompts if self.teacher_prompt_ids is None else (self.teacher_prompt_ids,)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedData:
    """Data ready for use."""

    records: tuple[TokenizedRecord, ...]
    """The records that are used, in the data's order."""
    num_dropped: int
    """Overlong records that are left out."""
    num_truncated: int
    """Overlong records that are used in part."""
    longest_prompt: int
    """Tokens of the longest prompt in use, the completions' prompts included."""
    block_tokens: int | None = None
    """Where the records are blocks of plain text: tokens of a whole one."""

    @property
    def longest_scored_prompt(self) -> int:
        """Tokens of the longest prompt that the teacher reads."""
        return max(len(prompt) for record in self.records for prompt in record.scored_prompts)

    @property
    def longest_completion(self) -> int:
        """Tokens of the longest of the dataset's responses; 0 where none is used."""
        return max((len(r.completion.response_ids) for r in self.records if r.completion is not None), default=0)

    @property
    def num_teacher_prompts(self) -> int:
        """Records in use with a prompt for the teacher alone."""
        return sum(record.teacher_prompt_ids is not None for record in self.records)

    @property
    def num_overlong(self) -> int:
        """Records whose prompt, or prompt and completion, are too long."""
        return self.num_dropped + self.num_truncated


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherRoom:
    """How much of a teacher's context its own prompts may fill."""

    context: int
    """Most tokens that the teacher reads at once."""
    response: int
    """Of those, how many the student's response may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How long a record may be, and what happens to one that is longer."""

    max_prompt_tokens: int
    """Most tokens of a prompt."""
    max_tokens: int
    """Most tokens of a prompt and its completion together."""
    overlong: Literal["drop", "truncate"]
    """`drop` leaves an overlong record out; `truncate` keeps the prompt's last tokens and the completion's first."""
    field: str
    """The config field that limits prompts, for messages."""
    teacher: TeacherRoom | None = None
    """For prompts that the teacher alone reads, which `max_prompt_tokens` does not count; None where they are not
    used."""


class Encoder:
    """Turns records into token ids with one model's tokenizer and chat template."""

    def __init__(
        self, tokenizer: Any, *, stop_ids: frozenset[int], chat_template_kwargs: dict[str, Any], model_field: str
    ) -> None:
        """Set up.

        Args:
            tokenizer: a Hugging Face tokenizer.
            stop_ids: tokens that end a response.
            chat_template_kwargs: passed to the chat template.
            model_field: the config field or argument that named the model, for messages.
        """
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._template = ChatTemplate(tokenizer, kwargs=chat_template_kwargs, model_field=model_field)
        self._model_field = model_field

    def encode(
        self, records: Sequence[Record], *, student_prompts: bool, completions: bool
    ) -> list[tuple[Ids, Completion | None]]:
        """What the student is asked, and what the dataset answers, of every record.

        Of a text that is the prompt, with whatever the tokenizer puts before one, and the completion and one stop
        token. Of a conversation it is all but the assistant's final turn, and all from the assistant's first turn to
        its last.

        Args:
            records: the records.
            student_prompts: False where the student answers nothing: a record's prompt is its completion's then.
            completions: False where completions are not used: there are none then.

        Raises:
            UserError: if a conversation cannot go through the chat template, or a completion needs a stop token and
                the tokenizer has none.
        """
        texts = iter(self._texts([r for r in records if isinstance(r, TextRecord)], completions))
        chats = iter(self._chats([r for r in records if isinstance(r, ChatRecord)], student_prompts, completions))
        return [next(texts) if isinstance(record, TextRecord) else next(chats) for record in records]

    def documents(self, texts: Sequence[str]) -> Iterator[Ids]:
        """Each text as it stands, nothing put before it, and the end token; of an empty one there is none.

        Raises:
            UserError: if the tokenizer has no end token.
        """
        end = self._eos_token_id()
        for first in range(0, len(texts), _DOCUMENTS_AT_ONCE):
            for ids in self._ids(texts[first : first + _DOCUMENTS_AT_ONCE]):
                yield (*ids, end) if ids else ()

    def teacher_prompts(self, records: Sequence[Record]) -> list[Ids | None]:
        """What the teacher is asked in the student's place; None where it is asked the same.

        Raises:
            UserError: if a conversation cannot go through the chat template.
        """
        own = [record for record in records if record.teacher_prompt is not None]
        texts = [record.teacher_prompt for record in own if isinstance(record, TextRecord)]
        chats = [self._template.teacher_prompt(record) for record in own if isinstance(record, ChatRecord)]
        read = iter(self._ids([text for text in texts if text is not None], add_special_tokens=True))
        asked = iter(self._ids([chat for chat in chats if chat is not None]))
        return [
            None if record.teacher_prompt is None else next(read if isinstance(record, TextRecord) else asked)
            for record in records
        ]

    def _texts(self, records: Sequence[TextRecord], completions: bool) -> Iterator[tuple[Ids, Completion | None]]:
        prompts = self._ids([record.prompt for record in records], add_special_tokens=True)
        answers = [record.completion if completions else None for record in records]
        responses = iter(self._ids([answer for answer in answers if answer is not None]))
        for prompt, answer in zip(prompts, answers, strict=True):
            if answer is None:
                yield prompt, None
            else:
                yield prompt, Completion(prompt_ids=prompt, response_ids=(*next(responses), self._eos_token_id()))

    def _chats(
        self, records: Sequence[ChatRecord], student_prompts: bool, completions: bool
    ) -> Iterator[tuple[Ids, Completion | None]]:
        chats = [self._template.conversation(record) if completions else None for record in records]
        prompts = iter(self._ids([chat.prompt for chat in chats if chat]))
        segments = iter(self._ids([segment.text for chat in chats if chat for segment in chat.segments]))
        asked = iter(self._ids([self._template.prompt(record) for record in records] if student_prompts else []))
        for chat in chats:
            completion = None
            if chat:
                completion = to_completion(
                    next(prompts),
                    [(next(segments), segment.by_assistant) for segment in chat.segments],
                    stop_ids=self._stop_ids,
                    eos_token_id=self._eos_token_id,
                )
            if student_prompts:
                yield next(asked), completion
            else:
                assert completion is not None, "records without one are refused where nothing else is used"
                yield completion.prompt_ids, completion

    def _eos_token_id(self) -> int:
        if self._tokenizer.eos_token_id is None:
            raise UserError(
                self._model_field, self._tokenizer.name_or_path, "its tokenizer has no stop token.", "Set eos_token."
            )
        return self._tokenizer.eos_token_id

    def _ids(self, texts: Sequence[str], *, add_special_tokens: bool = False) -> list[Ids]:
        # Chat templates write the special tokens themselves.
        encoded = self._tokenizer(list(texts), add_special_tokens=add_special_tokens)["input_ids"] if texts else []
        return [tuple(ids) for ids in encoded]


def tokenize(
    records: Sequence[Record], encoder: Encoder, *, limits: Limits, student_prompts: bool, completions: bool
) -> TokenizedData:
    """Token ids of the records, what is overlong dropped or truncated.

    What is never used can neither be too long nor lack a stop token, so it is not made.

    Args:
        records: the records, of all sources in their order.
        encoder: the student's.
        limits: how long they may be.
        student_prompts: whether the student answers prompts.
        completions: whether the dataset's completions are used.

    Raises:
        UserError: if a record cannot be encoded, or nothing is left.
    """
    encoded = encoder.encode(records, student_prompts=student_prompts, completions=completions)
    for_teacher = encoder.teacher_prompts(records) if limits.teacher else [None] * len(records)
    kept: list[TokenizedRecord] = []
    num_truncated = 0
    for index, (record, whole, privileged) in enumerate(zip(records, encoded, for_teacher, strict=True)):
        fitted = _fit(*whole, privileged, limits)
        if fitted is not None:
            prompt, completion, privileged_fitted = fitted
            kept.append(
                TokenizedRecord(index, prompt, completion, record.origin.source, record.teacher, privileged_fitted)
            )
            num_truncated += fitted != (*whole, privileged)
    if not kept:
        raise UserError(limits.field, limits.max_prompt_tokens, "no record fits.", "Raise it, or shorten the prompts.")
    return TokenizedData(
        records=tuple(kept),
        num_dropped=len(records) - len(kept),
        num_truncated=num_truncated,
        longest_prompt=max(len(prompt) for record in kept for prompt in record.prompts),
    )


def _fit(
    prompt_ids: Ids, completion: Completion | None, teacher_prompt_ids: Ids | None, limits: Limits
) -> tuple[Ids, Completion | None, Ids | None] | None:
    """What is used of a record; None: nothing."""
    whole = (prompt_ids, completion, teacher_prompt_ids)
    prompt, answer = prompt_ids[-limits.max_prompt_tokens :], completion and _cut(completion, limits)
    if not prompt or (completion is not None and answer is None):
        return None
    privileged = teacher_prompt_ids
    if privileged is not None and limits.teacher is not None:
        room = limits.teacher.context - max(limits.teacher.response, len(answer.response_ids) if answer else 0)
        privileged = privileged[-room:] if room > 0 else ()
        if not privileged:
            return None
    fitted = (prompt, answer, privileged)
    return fitted if fitted == whole or limits.overlong == "truncate" else None


def _cut(completion: Completion, limits: Limits) -> Completion | None:
    """A completion within the limits, up to its last token in the loss; None: there is no such token."""
    prompt = completion.prompt_ids[-limits.max_prompt_tokens :]
    room = max(0, limits.max_tokens - len(prompt))
    mask = (completion.loss_mask or (True,) * len(completion.response_ids))[:room]
    if not prompt or True not in mask:
        return None
    end = len(mask) - mask[::-1].index(True)
    return Completion(
        prompt_ids=prompt,
        response_ids=completion.response_ids[:end],
        loss_mask=None if all(mask[:end]) else mask[:end],
    )
