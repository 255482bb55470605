"""What `gkd init-student` and `student.init: truncate` share: which layers are kept, and the student made of them."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gkd.compress.strategies import DEFAULT_STRATEGY, STRATEGIES, kept_layers
from gkd.compress.truncate import truncate, truncated_config
from gkd.errors import UserError
from gkd.version import __version__


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which layers are to be kept, and under which names the user said so."""

    num_layers: int | None
    """How many, by a strategy."""
    strategy: str | None
    """Its name; None is the default."""
    listed: tuple[int, ...] | None
    """In the place of a strategy: the layers themselves, counted from 0."""
    names: tuple[str, str, str]
    """What the three are called where the user wrote them, for messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """What is kept of a model."""

    source_layers: int
    """How many layers it has."""
    layers: tuple[int, ...]
    """Those that are kept, in order."""
    strategy: str | None
    """What chose them; None: the user did."""


def choose_cut(wanted: Selection, source_layers: int) -> Cut:
    """The layers that are kept of so many.

    Raises:
        UserError: if they cannot be, or too much or too little is said.
    """
    many, keep, listed = wanted.names
    k = wanted.num_layers
    if k is not None and not 1 <= k < source_layers:
        raise UserError(many, k, f"the model has {source_layers} layers.", f"Keep 1 to {source_layers - 1}.")
    if wanted.listed is not None:
        return Cut(source_layers=source_layers, layers=_listed(wanted, wanted.listed, source_layers), strategy=None)
    if k is None:
        raise UserError(many, None, "is missing.", f"Say how many layers are kept, or which with {listed}.")
    strategy = DEFAULT_STRATEGY if wanted.strategy is None else wanted.strategy
    if strategy not in STRATEGIES:
        raise UserError(keep, strategy, "is no strategy.", f"Use one of {', '.join(STRATEGIES)}.")
    try:
        return Cut(source_layers=source_layers, layers=kept_layers(strategy, source_layers, k), strategy=strategy)
    except ValueError as error:
        raise UserError(many, k, f"does not fit: {error}.", f"Change it, or use another {keep}.") from None


def _listed(wanted: Selection, layers: tuple[int, ...], source_layers: int) -> tuple[int, ...]:
    many, keep, field = wanted.names
    text = ",".join(map(str, layers))
    if wanted.strategy is not None:
        raise UserError(field, text, f"contradicts {keep} {wanted.strategy}.", "Use one of the two.")
    if max(layers) >= source_layers:
        raise UserError(field, text, f"there is no layer {max(layers)}.", f"Layers are 0 to {source_layers - 1}.")
    if sorted(set(layers)) != list(layers):
        in_order = ",".join(map(str, sorted(set(layers))))
        raise UserError(field, text, "is not in order, or names a layer twice.", f"Write {in_order}.")
    if len(layers) == source_layers:
        raise UserError(field, text, "keeps every layer.", "Leave at least one out.")
    if wanted.num_layers not in (None, len(layers)):
        raise UserError(many, wanted.num_layers, f"contradicts {field}, which names {len(layers)}.", "Leave it out.")
    return layers


def shortened_config(path: str, cut: Cut, *, field: str) -> Any:
    """The config of the student.

    Args:
        path: folder or hub name of the model that is cut.
        cut: what is kept of it.
        field: what named the model, for messages.

    Raises:
        UserError: if it cannot be truncated, or not so.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path)
    if getattr(config, "quantization_config", None):
        raise UserError(field, path, "has quantized weights.", "Use the model that they were made from.")
    try:
        return truncated_config(config, cut.layers)
    except ValueError as error:
        raise UserError(
            field, path, f"cannot be truncated: {error}.", "Keep other layers (first_k changes least), or use another."
        ) from None


def truncated_model(path: str, cut: Cut) -> Any:
    """The model's own weights, in the precision that they are stored in; it is the only copy in memory."""
    from transformers import AutoModelForCausalLM

    return truncate(AutoModelForCausalLM.from_pretrained(path, dtype="auto"), cut.layers)


def write_student(model: Any, output: Path, *, source: str, cut: Cut, weights: str) -> None:
    """Write the student aside, then rename: a folder of that name is always whole.

    Args:
        model: the student.
        output: gets config, weights, generation config, tokenizer, and `truncation.json`, which says how it came.
        source: folder or hub name of the model that was cut.
        cut: what was kept of it.
        weights: where the student's come from, in words.
    """
    from trainer.export import write_model
    from trainer.weights import checkpoint_weights

    origin = {
        "source": source,
        "source_layers": cut.source_layers,
        "strategy": cut.strategy,
        "layers": cut.layers,
        "weights": weights,
        "gkd_version": __version__,
    }
    temporary = output.with_name(f"{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    write_model(temporary, model, checkpoint_weights(model), tokenizer=source)
    (temporary / "truncation.json").write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(output, ignore_errors=True)
    temporary.rename(output)
