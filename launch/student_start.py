"""The student that a run begins with. With `student.init: truncate` it is made of the model that the config names."""

from dataclasses import replace
from pathlib import Path

from gkd.config import Config
from launch.architecture import Architecture, architecture_of, read_architecture
from launch.models import ModelFacts
from launch.truncation import Cut, Selection, choose_cut, shortened_config, truncated_model, write_student

_FIELD = "student.model"
_NAMES = ("student.truncate.layers", "student.truncate.strategy", "student.truncate.keep_layers")


def student_architecture(config: Config, student: ModelFacts) -> Architecture:
    """The architecture that is trained: what is left of the named model where it is truncated. Writes nothing.

    Raises:
        UserError: if it cannot be built, or not be truncated.
    """
    if config.student.truncate is None:
        return read_architecture(student.path, field=_FIELD)
    shortened = shortened_config(student.path, _cut(config, student), field=_FIELD)
    return architecture_of(shortened, path=student.path, field=_FIELD)


def first_student(config: Config, student: ModelFacts) -> ModelFacts:
    """The student as the workers read it.

    A truncated one is made here, once: a run that goes on finds it in its folder.
    """
    if config.student.truncate is None:
        return student
    folder = init_folder(config.run.output_dir)
    if not folder.is_dir():
        cut = _cut(config, student)
        model = truncated_model(student.path, cut)
        write_student(model, folder, source=student.path, cut=cut, weights="of the source")
    return replace(student, path=str(folder))


def init_folder(run: Path) -> Path:
    """Where a run keeps the truncated student that it began with."""
    return run.absolute() / "init"


def _cut(config: Config, student: ModelFacts) -> Cut:
    from transformers import AutoConfig

    wanted = config.student.truncate
    assert wanted is not None, "asked for where the student is truncated"
    selection = Selection(
        num_layers=wanted.layers,
        strategy=wanted.strategy,
        listed=None if wanted.keep_layers is None else tuple(wanted.keep_layers),
        names=_NAMES,
    )
    return choose_cut(selection, AutoConfig.from_pretrained(student.path).get_text_config().num_hidden_layers)
