"""`gkd init-student`: a student made of some of a teacher's layers, as a model in Hugging Face format."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gkd.compress.truncate import DEFAULT_STRATEGY, STRATEGIES, kept_layers, truncate, truncated_config
from gkd.errors import UserError
from gkd.version import __version__
from launch.architecture import read_architecture
from launch.models import read_model
from launch.outputs import check_new_folder

_FIELD = "TEACHER"


@dataclass(frozen=True, slots=True, kw_only=True)
class InitStudentRequest:
    """What `gkd init-student` was asked."""

    teacher: str
    """Folder or hub name."""
    output: Path
    """A folder that is not there yet, or is empty."""
    num_layers: int | None
    """How many layers are kept, by a strategy."""
    strategy: str | None
    """Its name; None is the default."""
    layers: str | None
    """In the place of a strategy: the layers that are kept, as `0,2,5`."""
    random: bool
    """The same shape with random weights."""
    seed: int
    """Of random weights."""


def run_init_student(request: InitStudentRequest, console: Console) -> None:
    """Write the student: config, weights, generation config, tokenizer, and `truncation.json`, which says how it came.

    Raises:
        UserError: before any weights are read, for anything that the user can mend.
    """
    output = request.output.absolute()
    check_new_folder(output, field="OUTPUT")
    teacher = read_model(request.teacher, field=_FIELD, need_weights=not request.random)
    architecture = read_architecture(teacher.path, field=_FIELD)
    layers, strategy = _layers(request, architecture.num_layers)
    config = _student_config(teacher.path, layers)
    with console.status(f"{request.teacher}: {len(layers)} of {architecture.num_layers} layers to {output}"):
        model = _random(teacher.path, config, request.seed) if request.random else _truncated(teacher.path, layers)
        origin = {
            "source": teacher.path,
            "source_layers": architecture.num_layers,
            "strategy": strategy,
            "layers": layers,
            "weights": f"random, seed {request.seed}" if request.random else "of the source",
            "gkd_version": __version__,
        }
        _write(model, origin, output)
    kept = sum(parameter.numel() for parameter in model.parameters())
    table = Table("measure", "teacher", "student")
    table.add_row("layers", f"{architecture.num_layers}", f"{len(layers)} ({', '.join(map(str, layers))})")
    table.add_row("chosen by", "", strategy or "--keep-layers")
    table.add_row("parameters", f"{architecture.num_parameters:,}", f"{kept:,}")
    table.add_row("share", "100.0%", f"{kept / architecture.num_parameters:.1%}")
    table.add_row("weights", "", "random" if request.random else "the teacher's")
    console.print(table)
    console.print(f"The student is in {output}")


def _layers(request: InitStudentRequest, num_layers: int) -> tuple[tuple[int, ...], str | None]:
    """The layers that are kept, and the strategy that chose them, if one did."""
    k = request.num_layers
    if k is not None and not 1 <= k < num_layers:
        raise UserError("--layers", k, f"the model has {num_layers} layers.", f"Keep 1 to {num_layers - 1}.")
    if request.layers is not None:
        return _listed_layers(request, request.layers, num_layers), None
    if k is None:
        raise UserError("--layers", None, "is missing.", "Say how many layers are kept, or which with --keep-layers.")
    strategy = DEFAULT_STRATEGY if request.strategy is None else request.strategy
    if strategy not in STRATEGIES:
        raise UserError("--keep", strategy, "is no strategy.", f"Use one of {', '.join(STRATEGIES)}.")
    try:
        return kept_layers(strategy, num_layers, k), strategy
    except ValueError as error:
        raise UserError("--layers", k, f"does not fit: {error}.", "Change it, or use another --keep.") from None


def _listed_layers(request: InitStudentRequest, text: str, num_layers: int) -> tuple[int, ...]:
    field = "--keep-layers"
    if request.strategy is not None:
        raise UserError(field, text, f"contradicts --keep {request.strategy}.", "Use one of the two.")
    names = [name.strip() for name in text.split(",")]
    if not all(name.isascii() and name.isdigit() for name in names):
        raise UserError(field, text, "is no list of layers.", "Write them as 0,2,5.")
    layers = tuple(int(name) for name in names)
    if max(layers) >= num_layers:
        raise UserError(field, text, f"there is no layer {max(layers)}.", f"Layers are 0 to {num_layers - 1}.")
    if sorted(set(layers)) != list(layers):
        raise UserError(
            field, text, "is not in order, or names a layer twice.", f"Write {','.join(map(str, sorted(set(layers))))}."
        )
    if len(layers) == num_layers:
        raise UserError(field, text, "keeps every layer.", "Leave at least one out.")
    if request.num_layers not in (None, len(layers)):
        raise UserError(
            "--layers", request.num_layers, f"contradicts --keep-layers, which names {len(layers)}.", "Leave it out."
        )
    return layers


def _student_config(path: str, layers: tuple[int, ...]) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path)
    if getattr(config, "quantization_config", None):
        raise UserError(_FIELD, path, "has quantized weights.", "Use the model that they were made from.")
    try:
        return truncated_config(config, layers)
    except ValueError as error:
        raise UserError(
            _FIELD, path, f"cannot be truncated: {error}.", "Keep other layers (first_k changes least), or use another."
        ) from None


def _truncated(path: str, layers: tuple[int, ...]) -> Any:
    """The teacher's own weights, in the precision that they are stored in; the teacher is the only copy in memory."""
    from transformers import AutoModelForCausalLM

    return truncate(AutoModelForCausalLM.from_pretrained(path, dtype="auto"), layers)


def _random(path: str, config: Any, seed: int) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
    try:
        model.generation_config = GenerationConfig.from_pretrained(path)
    except OSError:  # the teacher has none: the one that follows from its config is as good
        return model
    return model


def _write(model: Any, origin: dict[str, Any], output: Path) -> None:
    from trainer.export import write_model
    from trainer.weights import checkpoint_weights

    temporary = output.with_name(f"{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    write_model(temporary, model, checkpoint_weights(model), tokenizer=origin["source"])
    (temporary / "truncation.json").write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(output, ignore_errors=True)
    temporary.rename(output)
