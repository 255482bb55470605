"""Conversations through a model's chat template, and which of their tokens the assistant wrote.

Templates do not say where an assistant's turn begins and ends, so it is found by rendering ever longer beginnings of
the conversation: what a turn adds to the text before it is that turn.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gkd.errors import UserError
from gkd.types import Completion
from rollout.records import ChatRecord


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a rendered conversation, tokenised on its own."""

    text: str
    """As the template wrote it."""
    by_assistant: bool
    """Whether it is an assistant's turn, or what stands between two of them."""


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A conversation up to its last assistant's turn."""

    prompt: str
    """All before the first assistant's turn, and the words that ask for it."""
    segments: tuple[Segment, ...]
    """The rest; the first and the last are the assistant's."""


class ChatTemplate:
    """A tokenizer's chat template with the run's arguments."""

    def __init__(self, tokenizer: Any, *, kwargs: dict[str, Any], model_field: str) -> None:
        """`model_field` is the config field or argument that named the model, for messages."""
        self._tokenizer = tokenizer
        self._kwargs = kwargs
        self._model_field = model_field

    def prompt(self, record: ChatRecord) -> str:
        """What the student is asked: all before the assistant's final turn.

        Raises:
            UserError: if there is no template, or it refuses the conversation.
        """
        ends_answered = record.messages[-1]["role"] == "assistant"
        return self._render(record, record.messages[: len(record.messages) - ends_answered], ask=True)

    def teacher_prompt(self, record: ChatRecord) -> str | None:
        """What the teacher is asked in the student's place; None where it is asked the same.

        Raises:
            UserError: as `prompt`.
        """
        return None if record.teacher_prompt is None else self._render(record, record.teacher_prompt, ask=True)

    def conversation(self, record: ChatRecord) -> RenderedChat | None:
        """The conversation in pieces; None where the assistant says nothing.

        Raises:
            UserError: if there is no template, it refuses the conversation, or it writes a turn differently once
                others follow: then no piece of the text is that turn.
        """
        turns = [i for i, message in enumerate(record.messages) if message["role"] == "assistant"]
        if not turns:
            return None
        prompt = asked = answered = self._render(record, record.messages[: turns[0]], ask=True)
        segments: list[Segment] = []
        for turn in turns:
            if segments:
                asked = self._render(record, record.messages[:turn], ask=True)
                segments.append(Segment(_added(record, answered, asked), by_assistant=False))
            answered = self._render(record, record.messages[: turn + 1], ask=False)
            segments.append(Segment(_added(record, asked, answered), by_assistant=True))
        return RenderedChat(prompt, tuple(segments))

    def _render(self, record: ChatRecord, messages: Sequence[dict[str, Any]], *, ask: bool) -> str:
        from jinja2 import TemplateError

        if not (self._tokenizer.chat_template or self._kwargs.get("chat_template")):
            raise UserError(
                self._model_field,
                self._tokenizer.name_or_path,
                f"its tokenizer has no chat template, and {record.origin.place} is a conversation.",
                "Use a model with one, save a chat_template with its tokenizer, or give prompts and completions.",
            )
        try:
            return self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=ask, **self._kwargs
            )
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise record.origin.error(
                f"is refused by the model's chat template: {error}.",
                "Change the conversation as the template wants it.",
            ) from None


def _added(record: ChatRecord, before: str, after: str) -> str:
    if not after.startswith(before):
        raise record.origin.error(
            "has an assistant's turn that the model's chat template writes differently once the conversation goes "
            "on (many leave out earlier reasoning), so it cannot be trained on as it was said.",
            "Split the conversation so that each record ends with its only assistant's turn, set "
            "data.chat_template_kwargs so that the template keeps such turns, or set data.on_policy_fraction: 1.",
        )
    return after[len(before) :]


def to_completion(
    prompt_ids: tuple[int, ...],
    segments: Sequence[tuple[Sequence[int], bool]],
    *,
    stop_ids: frozenset[int],
    eos_token_id: Callable[[], int],
) -> Completion:
    """Put a tokenised conversation together, with the loss on what an assistant would have to write.

    That is each of its turns up to the last stop token in it; what the template adds after that (often a line break)
    is read before the next turn but never written. The final turn ends in its stop token.

    Args:
        prompt_ids: the prompt's tokens.
        segments: tokens of each segment and whether the assistant wrote it; the last is the assistant's.
        stop_ids: tokens that end a response.
        eos_token_id: gives the token that ends the final turn where the template does not.
    """
    response: list[int] = []
    mask: list[bool] = []
    for ids, by_assistant in segments:
        stops = [i for i, token in enumerate(ids, start=1) if token in stop_ids]
        written = 0 if not by_assistant else stops[-1] if stops else len(ids)
        response += ids
        mask += [True] * written + [False] * (len(ids) - written)
    if stops:
        del response[len(response) - len(ids) + stops[-1] :]
        del mask[len(response) :]
    else:
        response.append(eos_token_id())
        mask.append(True)
    return Completion(prompt_ids=prompt_ids, response_ids=tuple(response), loss_mask=None if all(mask) else tuple(mask))
