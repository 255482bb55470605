"""`gkd init-student`: a student made of some of a teacher's layers, as a model in Hugging Face format."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gkd.errors import UserError
from launch.architecture import read_architecture
from launch.models import read_model
from launch.outputs import check_new_folder
from launch.truncation import Selection, choose_cut, shortened_config, truncated_model, write_student

_FIELD = "TEACHER"
_NAMES = ("--layers", "--keep", "--keep-layers")


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
    cut = choose_cut(_selection(request), architecture.num_layers)
    config = shortened_config(teacher.path, cut, field=_FIELD)
    weights = f"random, seed {request.seed}" if request.random else "of the source"
    with console.status(f"{request.teacher}: {len(cut.layers)} of {architecture.num_layers} layers to {output}"):
        model = _random(teacher.path, config, request.seed) if request.random else truncated_model(teacher.path, cut)
        write_student(model, output, source=teacher.path, cut=cut, weights=weights)
    kept = sum(parameter.numel() for parameter in model.parameters())
    table = Table("measure", "teacher", "student")
    table.add_row("layers", f"{architecture.num_layers}", f"{len(cut.layers)} ({', '.join(map(str, cut.layers))})")
    table.add_row("chosen by", "", cut.strategy or "--keep-layers")
    table.add_row("parameters", f"{architecture.num_parameters:,}", f"{kept:,}")
    table.add_row("share", "100.0%", f"{kept / architecture.num_parameters:.1%}")
    table.add_row("weights", "", "random" if request.random else "the teacher's")
    console.print(table)
    console.print(f"The student is in {output}")


def _selection(request: InitStudentRequest) -> Selection:
    listed = None
    if request.layers is not None:
        names = [name.strip() for name in request.layers.split(",")]
        if not all(name.isascii() and name.isdigit() for name in names):
            raise UserError(_NAMES[2], request.layers, "is no list of layers.", "Write them as 0,2,5.")
        listed = tuple(int(name) for name in names)
    return Selection(num_layers=request.num_layers, strategy=request.strategy, listed=listed, names=_NAMES)


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
