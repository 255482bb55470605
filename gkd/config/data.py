"""The `data` section."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_serializer, field_validator, model_validator

from gkd.config.base import Count, Fraction, Positive, Section

_FORMATS: dict[str, Literal["jsonl", "parquet"]] = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
"""File name suffix -> format."""

_OURS = frozenset({"conversation", "tokenize", "add_generation_prompt", "continue_final_message"})
"""Arguments of the chat template that the system itself decides."""


class DataSource(Section):
    """Where records come from. A record is `{"prompt": str, "completion"?: str}` or `{"messages": [...]}`, messages
    being `{"role": str, "content": str}` in turn; where one has both, its messages count. Either may have a prompt for
    the teacher alone, and name one of several teachers. A record that has neither is plain text to learn as it stands,
    `{"text": str}`: all of the data is, or none. Other keys are ignored."""

    path: str = Field(min_length=1)
    """A file, a folder or the name of a Hugging Face dataset."""
    format: Literal["auto", "jsonl", "parquet", "hub"] = "auto"
    """`jsonl`: one JSON object a line; `parquet`: one row a record; `hub`: what the `datasets` library reads, be it a
    folder that it saved, a folder of data files or a dataset by name. `auto`: by the suffix (.jsonl, .json, .parquet),
    and everything else is `hub`."""
    subset: str | None = None
    """Name of a Hugging Face dataset's subset, where it has several."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    weight: Positive | None = None
    """Share of the training samples that come from here, relative to the other sources' weights. None in all sources:
    their records are shuffled together, each used once an epoch."""
    prompt_field: str = "prompt"
    """Key or column of the prompt."""
    completion_field: str = "completion"
    """Key or column of the completion."""
    messages_field: str = "messages"
    """Key or column of the messages."""
    text_field: str = "text"
    """Key or column of plain text."""
    teacher_prompt_field: str = "teacher_prompt"
    """Key or column of what the teacher reads where the student reads the prompt, such as the prompt with the solution
    in it; a record without it has one prompt for both. A text for a text; for a conversation messages that end before
    the assistant's final turn, or a text that stands for one message of the user. `max_prompt_tokens` does not count
    it; it has to fit the teacher's context."""
    teacher_field: str = "teacher"
    """Key or column of the name of the teacher that scores a record, where there are several without weights; a record
    without it has the first."""

    @model_validator(mode="after")
    def subset_and_split_mean_something(self) -> "DataSource":
        """A file has neither."""
        if self.resolved_format != "hub" and (self.subset is not None or self.split != "train"):
            raise ValueError(f"`subset` and `split` are of Hugging Face datasets; {self.path} is a file: remove them")
        return self

    @property
    def resolved_format(self) -> Literal["jsonl", "parquet", "hub"]:
        """`format`, with `auto` resolved."""
        if self.format == "auto":
            return _FORMATS.get(Path(self.path).suffix.lower(), "hub")
        return self.format


def _as_list(value: Any) -> Any:
    """One source may be written without the list around it; None is no source."""
    return value if isinstance(value, list) else [] if value is None else [value]


Sources = Annotated[list[DataSource], BeforeValidator(_as_list)]


def dump_sources(sources: list[DataSource]) -> Any:
    """As a user writes them: one without a list around it, None for none."""
    dumped = [source.model_dump() for source in sources]
    return dumped if len(dumped) > 1 else dumped[0] if dumped else None


class DataConfig(Section):
    """What the student is trained on."""

    train: Annotated[Sources, Field(min_length=1)]
    """Training records: one source, or a list of them."""
    eval: Sources = []
    """Held-out records: one source, or a list of them."""
    on_policy_fraction: Fraction = 1.0
    """lambda: the share of samples that the student writes itself; the rest are the dataset's completions. Of no effect
    where an objective says whose text it is of: sft (the dataset's) and seq_kd (the teacher's)."""
    mixing: Literal["per_step", "per_sample"] = "per_step"
    """One Bernoulli draw a step, as the GKD paper does, or one a sample."""
    max_prompt_tokens: Count | None = None
    """Prompts longer than this are overlong; None: what fits the models' context beside the response."""
    overlong: Literal["drop", "truncate"] = "drop"
    """What happens to a record whose prompt is overlong, or whose prompt and completion exceed the context. `drop`
    leaves it out. `truncate` keeps the prompt's last tokens and the completion's first, and adds no stop token. Either
    way it is counted and reported."""
    text_block_tokens: Annotated[int, Field(ge=2)] | None = None
    """Of plain text: the documents, each with the end token behind it, are joined in their order and cut into blocks of
    so many tokens. A block is a sample; every token after its first is a target. None: 1,024, or the models' context if
    that is shorter. `max_prompt_tokens` and `overlong` are for prompts and mean nothing here."""
    chat_template_kwargs: dict[str, Any] = {}
    """Passed to the chat template, such as `enable_thinking: false`."""

    @field_validator("train")
    @classmethod
    def all_or_none_are_weighted(cls, train: list[DataSource]) -> list[DataSource]:
        """A weight is relative to the others', so either every source has one or none has."""
        without = [source.path for source in train if source.weight is None]
        if 0 < len(without) < len(train):
            raise ValueError(f"some sources have a `weight` and {', '.join(without)} has none: give all one, or none")
        return train

    @field_validator("eval")
    @classmethod
    def held_out_records_have_no_weight(cls, held_out: list[DataSource]) -> list[DataSource]:
        """All of them are used."""
        if any(source.weight is not None for source in held_out):
            raise ValueError("held-out sources take no `weight`, as all their records are used: remove it")
        return held_out

    @field_validator("chat_template_kwargs")
    @classmethod
    def template_arguments_are_free(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What the system decides itself cannot be set."""
        if taken := sorted(kwargs.keys() & _OURS):
            raise ValueError(f"`{'`, `'.join(taken)}` cannot be set here: gkd sets it itself")
        return kwargs

    @field_serializer("train", "eval")
    def one_source_as_a_mapping(self, sources: list[DataSource]) -> Any:
        """As a user writes them, so that `data.train.path` names the one source of a dumped config too."""
        return dump_sources(sources)

    @property
    def weights(self) -> list[float] | None:
        """The training sources' weights; None where they are shuffled together."""
        weights = [source.weight for source in self.train if source.weight is not None]
        return weights if len(weights) > 1 else None
