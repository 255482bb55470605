"""Plain text (`{"text": ...}` records) as training and held-out data."""

from collections.abc import Sequence
from typing import Literal

from gkd.config import Config
from gkd.errors import UserError
from rollout.records import Document, Record
from rollout.text_blocks import SHORTEST, text_blocks
from rollout.tokenized import Encoder, TokenizedData

DEFAULT_BLOCK = 1024
"""Tokens of a block where the config names none and the models' context has room for so many."""


def tokenize_text(
    config: Config,
    documents: Sequence[Document],
    encoder: Encoder,
    *,
    context: int,
    section: Literal["train", "eval"],
) -> TokenizedData:
    """Blocks of the documents. `data.max_prompt_tokens` and `data.overlong` have nothing to say here.

    Args:
        config: the run's.
        documents: of all sources in their order.
        encoder: the student's.
        context: most tokens that all models read at once.
        section: which of the config's data they are of.

    Raises:
        UserError: if the run asks for what text has not, a block does not fit, or there are no two tokens.
    """
    (_check_training if section == "train" else _check_evaluation)(config, documents[0])
    block = config.data.text_block_tokens or min(DEFAULT_BLOCK, context)
    if block > context:
        raise UserError(
            "data.text_block_tokens", block, f"exceeds a context of {context} tokens.", f"Set it to at most {context}."
        )
    tokens = encoder.documents([document.text for document in documents])
    sources = [document.origin.source for document in documents]
    blocks = text_blocks(zip(sources, tokens, strict=True), block_tokens=block)
    if not blocks:
        raise UserError(
            documents[0].origin.field, documents[0].origin.place, f"has no {SHORTEST} tokens.", "Give it some text."
        )
    return TokenizedData(records=blocks, num_dropped=0, num_truncated=0, longest_prompt=1, block_tokens=block)


def _check_training(config: Config, first: Document) -> None:
    if config.needs_rollouts:
        raise UserError(
            "data.on_policy_fraction",
            config.data.on_policy_fraction,
            f"needs prompts that the student answers, and {first.origin.place} is plain text.",
            "Set it to 0 to learn from the text itself, or give prompts.",
        )
    if config.teacher_writes:
        raise UserError(
            "objective.type",
            config.objective.type,
            f"needs prompts that the teacher answers, and {first.origin.place} is plain text.",
            "Give prompts, or learn from the text itself with sft, or with distill at data.on_policy_fraction 0.",
        )
    if config.reward is not None:
        raise UserError(
            "reward.path",
            config.reward.path,
            f"rewards answers, and {first.origin.place} is plain text.",
            "Remove the reward, or give prompts.",
        )
    if config.routes:
        raise UserError(
            "teachers",
            ", ".join(config.routes),
            f"are one for each record, and {first.origin.place} is plain text, of which a block may hold several.",
            "Give every teacher a weight (a mixture), or name one teacher.",
        )


def _check_evaluation(config: Config, first: Document) -> None:
    if config.asks_held_out:
        raise UserError(
            "eval.metrics",
            config.eval.metrics,
            f"ask for answers to prompts, and {first.origin.place} is plain text.",
            "Set eval.metrics to [cross_entropy], or give prompts.",
        )


def block_note(config: Config, records: Sequence[Sequence[Record]]) -> str | None:
    """That the length of blocks means nothing, where no data are text; `records` are all that the run has."""
    if config.data.text_block_tokens is None or any(isinstance(r, Document) for some in records for r in some[:1]):
        return None
    return "data.text_block_tokens is for plain text, and the data are prompts: it has no effect"


def text_notes(config: Config, documents: Sequence[Record]) -> list[str]:
    """What is set for prompts and means nothing for text, and how many documents hold nothing."""
    limits = {
        "max_prompt_tokens": config.data.max_prompt_tokens is not None,
        "overlong": config.data.overlong != "drop",
    }
    notes = [
        f"data.{name} is for prompts: text is cut into blocks of data.text_block_tokens, and nothing of it is too long"
        for name, is_set in limits.items()
        if is_set
    ]
    empty = sum(document.content == {"text": ""} for document in documents)
    return [*notes, *([f"{empty} of {len(documents)} documents are empty"] if empty else [])]
