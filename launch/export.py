"""`gkd export`: a checkpoint of a run as a model in Hugging Face format."""

import shutil
from pathlib import Path
from typing import Literal

from rich.console import Console

from gkd.config import Config, load_config
from gkd.errors import UserError
from launch.models import ModelFacts, read_model
from launch.outputs import check_new_folder
from launch.student_start import init_folder
from trainer import checkpoint
from trainer.checkpoint import Checkpoint

Form = Literal["auto", "full", "merged", "adapter"]


def run_export(run: Path, output: Path, *, which: str, form: str, console: Console) -> None:
    """Write a checkpoint's student into `output`.

    Args:
        run: the run's folder.
        output: a folder that is not there yet, or is empty.
        which: `newest`, `best`, or a number of completed steps.
        form: `full` (a run without adapter), `merged` or `adapter` (a run with one); `auto` is full or merged.
        console: for progress.

    Raises:
        UserError: before anything is loaded, for anything that the user can mend.
    """
    if not (run / "config.yaml").is_file():
        raise UserError("RUN", str(run), "holds no run: there is no config.yaml.", "Name the output_dir of a run.")
    config = load_config(run / "config.yaml")
    chosen = _checkpoint(run, which)
    form = _form(config, form)
    check_new_folder(output, field="OUTPUT")
    output = output.absolute()
    student = _first_student(run, config)
    with console.status(f"{config.run.name}: step {chosen.step} to {output}"):
        temporary = output.with_name(f"{output.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        _write(config, chosen, student.path, form, temporary)
        shutil.rmtree(output, ignore_errors=True)
        temporary.rename(output)
    console.print(f"{config.run.name}: step {chosen.step} ({form}) is in {output}")


def _first_student(run: Path, config: Config) -> ModelFacts:
    """What the run began with, whose weights a checkpoint replaces."""
    if config.student.init == "truncate":
        return read_model(str(init_folder(run)), field="RUN", need_weights=True)
    return read_model(config.student.model, field="student.model", need_weights=config.student.init != "random")


def _checkpoint(run: Path, which: str) -> Checkpoint:
    folder = run / "checkpoints"
    newest = checkpoint.newest(folder)
    if newest is None:
        raise UserError("RUN", str(run), "holds no complete checkpoint.", "Let the run save one first.")
    if which == "newest":
        return newest
    step = newest.state.get("best", {}).get("step") if which == "best" else which
    if step is None:
        raise UserError(
            "--step", which, "is not known: the run compared no evaluations.", "Set eval.best, or name a step."
        )
    found = checkpoint.read(folder / f"step_{step}")
    if found is None:
        there = ", ".join(sorted(path.name for path in folder.iterdir()))
        raise UserError("--step", which, "is no complete checkpoint.", f"There are: {there}.")
    return found


def _form(config: Config, form: str) -> str:
    forms = ("full",) if config.student.lora is None else ("merged", "adapter")
    if form == "auto":
        return forms[0]
    if form not in forms:
        kind = "no adapter" if config.student.lora is None else "an adapter"
        raise UserError("--form", form, f"does not fit: the run trains {kind}.", f"Use {' or '.join(forms)}.")
    return form


def _write(config: Config, chosen: Checkpoint, path: str, form: str, folder: Path) -> None:
    from launch.build import lora_settings
    from trainer.deepspeed_checkpoint import trained_weights
    from trainer.export import write_model
    from trainer.lora import adapter_weights, merged_weights, write_adapter
    from trainer.student_model import load_student
    from trainer.weights import checkpoint_weights

    model = load_student(
        path,
        dtype=config.trainer.dtype,
        init="random" if config.student.init == "random" else "pretrained",
        seed=config.run.seed,
        lora=lora_settings(config),
        gradient_checkpointing=False,
    )
    has_frozen = config.student.lora is not None
    trained = trained_weights(chosen.folder, zero_stage=config.trainer.zero_stage, has_frozen=has_frozen)
    found = model.load_state_dict(trained, strict=False)
    expected = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not found.unexpected_keys and expected <= trained.keys(), (found.unexpected_keys, expected - trained.keys())
    match form:
        case "full":
            write_model(folder, model, checkpoint_weights(model), tokenizer=path)
        case "merged":
            write_model(folder, model.get_base_model(), merged_weights(model), tokenizer=path)
        case "adapter":
            write_adapter(folder, model, adapter_weights(model))
