"""What can be known of a model without loading its weights."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gkd.errors import UserError
from gkd.vocabulary import tokenizer_size
from launch.hub import use_hub_or_cache


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Facts from a model's config, tokenizer and generation config."""

    path: str
    """Absolute folder, so that it means the same in every worker, or hub name."""
    head_rows: int
    """Rows of the head, padding included."""
    context: int
    """Most positions."""
    head_dim: int | None
    """Width of an attention head; None for architectures without attention."""
    stop_ids: frozenset[int]
    """Tokens that end a response, from the tokenizer, the config and the generation config."""
    tokenizer: Any
    """Its tokenizer; None where its config alone was read."""
    num_heads: int | None = None
    """Attention heads, over which tensor parallelism spreads it; None for architectures without attention."""


def read_model(path: str, *, field: str, need_weights: bool) -> ModelFacts:
    """Read a model's facts.

    Args:
        path: folder or hub name.
        field: the config field that named it, for messages.
        need_weights: refuse a local folder without weights.

    Raises:
        UserError: if it is no causal language model with a tokenizer, or its weights are missing.
    """
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").exists():
        raise UserError(field, path, "holds no config.json.", "Give a folder in Hugging Face format.")
    if need_weights and folder.is_dir() and not weight_files(folder):
        raise UserError(
            field,
            path,
            "holds no weights.",
            "Export the model there, or set student.init: random to train from scratch.",
        )
    config = _read_part(path, "AutoConfig", field=field)
    tokenizer = _read_part(path, "AutoTokenizer", field=field)
    stop_ids = frozenset(
        i for i in _stop_ids(path, config.get_text_config(), tokenizer) if i < tokenizer_size(tokenizer)
    )
    return replace(_facts(path, config, field=field), tokenizer=tokenizer, stop_ids=stop_ids)


def read_shape(path: str, *, field: str) -> ModelFacts:
    """What a model's config.json says alone: its tokenizer is None, and no token ends a response.

    Args:
        path: folder or hub name.
        field: the config field that named it, for messages.

    Raises:
        UserError: if it is no causal language model.
    """
    return _facts(path, _read_part(path, "AutoConfig", field=field), field=field)


def _read_part(path: str, part: str, *, field: str) -> Any:
    """What one of transformers' classes for every model reads."""
    import transformers

    if not Path(path).is_dir():
        use_hub_or_cache()
    try:
        return getattr(transformers, part).from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(
            field, path, f"cannot be read: {reason}.", "Give a folder in Hugging Face format, or a hub name."
        ) from None


def _facts(path: str, config: Any, *, field: str) -> ModelFacts:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(field, path, f"is a {config.model_type}, not a causal language model.", "Use another model.")
    text, folder = config.get_text_config(), Path(path)
    return ModelFacts(
        path=str(folder.resolve()) if folder.is_dir() else path,
        head_rows=text.vocab_size,
        context=getattr(text, "max_position_embeddings", None) or 2**31,
        head_dim=head_width(text),
        stop_ids=frozenset(),
        tokenizer=None,
        num_heads=getattr(text, "num_attention_heads", None),
    )


def head_width(config: Any) -> int | None:
    """Width of an attention head by a model's config; None for architectures without attention."""
    heads = getattr(config, "num_attention_heads", None)
    return getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else None)


def weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights."""
    return [p for pattern in ("*.safetensors", "pytorch_model*.bin") for p in folder.glob(pattern)]


def _stop_ids(path: str, config: Any, tokenizer: Any) -> set[int]:
    from transformers import GenerationConfig

    try:
        generation: Any = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # most models trained from scratch have none
        generation = None
    found: set[int] = set()
    for ids in (tokenizer.eos_token_id, getattr(config, "eos_token_id", None), generation):
        found.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    return found
