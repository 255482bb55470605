"""Training records, and the order in which they are used."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from gkd.errors import UserError
from gkd.seeds import generator
from gkd.types import Prompt, SampleId


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a data file."""

    prompt: str
    """What the student reads."""
    completion: str | None
    """What the dataset answers, without a stop token."""


@dataclass(frozen=True, slots=True)
class TokenizedRecord:
    """A record as token ids."""

    index: int
    """Its place in the data file, blank lines not counted."""
    prompt_ids: tuple[int, ...]
    """The prompt, with whatever the tokenizer puts before a text."""
    completion_ids: tuple[int, ...] | None
    """The completion and one stop token."""


@dataclass(frozen=True, slots=True)
class TokenizedData:
    """A data file ready for use."""

    records: tuple[TokenizedRecord, ...]
    """The records that fit, in file order."""
    num_overlong: int
    """Records left out because their prompt or completion is too long."""
    longest_prompt: int
    """Tokens of the longest prompt kept."""


def read_jsonl(path: str | Path, *, field: str, need_completion: bool = False) -> list[Record]:
    """Read `{"prompt": str, "completion"?: str}` records, one JSON object a line.

    Args:
        path: the file.
        field: the config field that named it, for messages.
        need_completion: refuse records without a completion.

    Raises:
        UserError: for a missing or empty file, and for the first bad line, by number.
    """
    try:
        # Not splitlines(): it also splits at characters that JSON allows inside strings (U+2028).
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(field, str(path), f"cannot be read: {error}.", "Give a UTF-8 JSONL file.") from None
    records = [
        _parse(line, where=f"{path}, line {number}", field=field, need_completion=need_completion)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not records:
        raise UserError(field, str(path), "holds no records.", 'Write one {"prompt": ...} object a line.')
    return records


def _parse(line: str, *, where: str, field: str, need_completion: bool) -> Record:
    def refuse(problem: str, cure: str) -> UserError:
        return UserError(field, where, problem, cure)

    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise refuse(f"is not valid JSON: {error}.", "Write one JSON object a line.") from None
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str) or not record["prompt"]:
        raise refuse("has no prompt.", 'Each line needs {"prompt": "some text"}.')
    completion = record.get("completion")
    if completion is not None and not isinstance(completion, str):
        raise refuse(f"has a completion that is no text but {type(completion).__name__}.", "Make it a string.")
    if completion is None and need_completion:
        raise refuse(
            "has no completion.",
            "Off-policy samples are the dataset's completions: add them, or set data.on_policy_fraction: 1.",
        )
    return Record(prompt=record["prompt"], completion=completion)


def tokenize(
    records: Sequence[Record], tokenizer: Any, *, max_prompt_tokens: int, max_tokens: int, field: str
) -> TokenizedData:
    """Token ids of every record that fits; nothing is cut.

    Args:
        records: the records.
        tokenizer: a Hugging Face tokenizer; a completion ends in its `eos_token_id`.
        max_prompt_tokens: longer prompts are left out and counted.
        field: the config field that limits prompts, for messages.
        max_tokens: records whose prompt and completion together are longer are left out and counted.

    Raises:
        UserError: if a completion needs a stop token and the tokenizer has none, or nothing is left.
    """
    if tokenizer.eos_token_id is None and any(record.completion is not None for record in records):
        raise UserError("student.model", tokenizer.name_or_path, "its tokenizer has no stop token.", "Set eos_token.")
    prompts = tokenizer([record.prompt for record in records])["input_ids"]
    completions = _tokenize_completions(records, tokenizer)
    kept = tuple(
        TokenizedRecord(index, tuple(prompt), completion)
        for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        if 0 < len(prompt) <= max_prompt_tokens and len(prompt) + len(completion or ()) <= max_tokens
    )
    if not kept:
        raise UserError(field, max_prompt_tokens, "no record fits.", "Raise it, or shorten the prompts.")
    return TokenizedData(
        records=kept,
        num_overlong=len(records) - len(kept),
        longest_prompt=max(len(record.prompt_ids) for record in kept),
    )


def _tokenize_completions(records: Sequence[Record], tokenizer: Any) -> list[tuple[int, ...] | None]:
    texts = [record.completion for record in records if record.completion is not None]
    encoded = iter(tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
    return [None if record.completion is None else (*next(encoded), tokenizer.eos_token_id) for record in records]


class PromptStream:
    """The prompts of any optimizer step, as a pure function of the seed and the step.

    Sample number n of the run (from 0) is prompt n // samples_per_prompt of the stream; the stream goes through the
    data in an order shuffled anew for each epoch. There is no cursor to lose: a resumed run asks for the next step.
    """

    def __init__(self, records: Sequence[TokenizedRecord], *, seed: int, samples_per_prompt: int) -> None:
        self._records = records
        self._seed = seed
        self._samples_per_prompt = samples_per_prompt
        self._order = lru_cache(maxsize=2)(self._shuffle)  # a step can straddle two epochs

    def _shuffle(self, epoch: int) -> np.ndarray:
        return generator(self._seed, "prompt-order", epoch).permutation(len(self._records))

    def sample(self, number: int) -> Prompt:
        """The prompt of the run's sample `number`, counted from 0."""
        prompt_number, sample_index = divmod(number, self._samples_per_prompt)
        epoch, place = divmod(prompt_number, len(self._records))
        record = self._records[self._order(epoch)[place]]
        return Prompt(
            id=SampleId(epoch, record.index, sample_index),
            token_ids=record.prompt_ids,
            completion_ids=record.completion_ids,
        )
