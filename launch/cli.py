"""The `gkd` command."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from gkd.errors import Interrupted, UserError
from gkd.version import __version__

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file; see configs/.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as trainer.max_steps=10.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gkd {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, help="Print the version.")] = False,
) -> None:
    """Streaming on-policy distillation: a student learns from a teacher on text that the student itself writes.

    Exit codes: 0 fine; 2 a mistake in the config, the data or the arguments; 130 interrupted after a checkpoint;
    1 anything else.
    """


@app.command()
def train(config: ConfigFile, overrides: Overrides = None) -> None:
    """Train a student as CONFIG says, and export it. Goes on from the newest checkpoint if there is one."""
    from gkd.config import load_config

    parsed = load_config(config, overrides)
    from launch.train import run_training  # imports transformers: only once the config is known to be good

    run_training(parsed, Console())


@app.command()
def check(
    config: ConfigFile,
    overrides: Overrides = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Leave out models and datasets that are not on this host, and its size.")
    ] = False,
) -> None:
    """Check CONFIG, its data and its models without starting anything, and show what it needs."""
    from gkd.config import load_config

    parsed = load_config(config, overrides)
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's library is imported
    from launch.check import run_check

    run_check(parsed, Console(), offline=offline)


@app.command()
def score(config: ConfigFile, overrides: Overrides = None) -> None:
    """Let the teachers of CONFIG score the dataset's text into teacher.cache, for runs that then load no teacher.

    Goes on where it was stopped.
    """
    from gkd.config import load_config

    parsed = load_config(config, overrides)
    from launch.score import run_score

    run_score(parsed, Console())


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    run: Annotated[Path | None, typer.Option(help="Take rates from this finished run, and say who waited.")] = None,
    devices: Annotated[int | None, typer.Option(help="Split so many devices over the workers.")] = None,
    device_memory_gib: Annotated[
        float | None, typer.Option(help="Of each device: what does not fit is refused.")
    ] = None,
    rollout_tokens_per_s: Annotated[float | None, typer.Option(help="Response tokens per second and device.")] = None,
    teacher_tokens_per_s: Annotated[float | None, typer.Option(help="Likewise, scored.")] = None,
    train_tokens_per_s: Annotated[float | None, typer.Option(help="Likewise, trained on.")] = None,
    sync_bytes_per_s: Annotated[float | None, typer.Option(help="Of weights to each engine.")] = None,
    peak_tflops: Annotated[float | None, typer.Option(help="Of a device: rates by arithmetic.")] = None,
    utilisation: Annotated[float | None, typer.Option(help="Share of it that teachers and trainer reach.")] = None,
    rollout_utilisation: Annotated[float | None, typer.Option(help="Share that engines reach, if another.")] = None,
    prompt_tokens: Annotated[float | None, typer.Option(help="Mean length of a prompt.")] = None,
    response_tokens: Annotated[float | None, typer.Option(help="Mean length of a response.")] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Workers are processes of a host without GPUs.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Plan CONFIG on paper: memory of each worker, bytes over each wire, seconds of a step and what bounds it.

    Starts nothing. Times need rates: of a run, given, or by arithmetic. Models may be folders with a config.json alone.
    """
    from gkd.config import load_config
    from launch.planning.request import PlanRequest

    parsed = load_config(config, overrides)
    request = PlanRequest(
        run=run,
        devices=devices,
        device_memory_gib=device_memory_gib,
        rollout_tokens_per_s=rollout_tokens_per_s,
        teacher_tokens_per_s=teacher_tokens_per_s,
        train_tokens_per_s=train_tokens_per_s,
        sync_bytes_per_s=sync_bytes_per_s,
        peak_tflops=peak_tflops,
        utilisation=utilisation,
        rollout_utilisation=rollout_utilisation,
        prompt_tokens=prompt_tokens,
        response_tokens=response_tokens,
        on_cpu=cpu,
    )
    request.check()
    from launch.planning.view import run_plan

    run_plan(parsed, request, Console(), as_json=as_json)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="The student: a folder in Hugging Face format, or a hub name.")],
    data: Annotated[Path, typer.Option(help="Records: a JSONL or Parquet file, or a dataset.")],
    teacher: Annotated[str | None, typer.Option(help="Measure the divergence to this model.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length at which a response is cut.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of the sampled responses.")] = 1.0,
    divergence: Annotated[str, typer.Option(help="A divergence, with its default options.")] = "reverse_kl",
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first N records only.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampled responses.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Write the numbers to this JSON file.")] = None,
) -> None:
    """Exact match of greedy responses, and divergence to a teacher on the student's own and on dataset responses."""
    from launch.evaluate import EvalRequest, run_eval
    from launch.outputs import check_file

    if output is not None:
        check_file(output, field="--output")
    request = EvalRequest(
        model=model,
        data=data,
        teacher=teacher,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        divergence=divergence,
        limit=limit,
        seed=seed,
    )
    result = run_eval(request, Console())
    table = Table("measure", "value")
    for name, value in result.items():
        table.add_row(name, "-" if value is None else f"{value:,.4f}" if isinstance(value, float) else f"{value:,}")
    Console().print(table)
    if output is not None:
        import json

        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Who answers: a folder in Hugging Face format, or a hub name.")],
    data: Annotated[Path, typer.Option(help='Records {"prompt"} or {"messages"}: a file, a folder or a dataset.')],
    output: Annotated[Path, typer.Option(help="The JSONL file to write; it must not be there yet.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length at which an answer is cut.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="Of sampled answers; 0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1, help="Nucleus sampling; 1 is off.")] = 1.0,
    samples: Annotated[int, typer.Option(min=1, help="Answers to each prompt.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first N records only.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of sampled answers.")] = 0,
) -> None:
    """Write a model's answers as training data, such as a teacher's for sequence-level distillation."""
    from launch.generate import GenerateRequest, run_generate

    request = GenerateRequest(
        model=model,
        data=data,
        output=output,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        samples=samples,
        limit=limit,
        seed=seed,
    )
    run_generate(request, Console())


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The folder to write; not there yet, or empty.")],
    step: Annotated[
        str, typer.Option(help="newest, best (of the evaluations), or a number of completed steps.")
    ] = "newest",
    form: Annotated[str, typer.Option(help="auto, full, or of a run with an adapter: merged, adapter.")] = "auto",
) -> None:
    """Write a checkpoint's student in Hugging Face format. Needs no GPU, and no other worker."""
    from launch.export import run_export

    run_export(run, output, which=step, form=form, console=Console())


@app.command("init-student")
def init_student(
    teacher: Annotated[str, typer.Argument(help="A model: a folder in Hugging Face format, or a hub name.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The folder to write; not there yet, or empty.")],
    layers: Annotated[int | None, typer.Option(help="How many of the teacher's layers are kept.")] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            help="Which: spaced_from_first (the default), first_k, last_k, both_ends, uniform, every_other, "
            "first_k_and_last."
        ),
    ] = None,
    keep_layers: Annotated[
        str | None, typer.Option(metavar="0,2,5", help="In the place of --layers and --keep: these, counted from 0.")
    ] = None,
    random: Annotated[bool, typer.Option("--random", help="The same shape with random weights, to compare.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of random weights.")] = 0,
) -> None:
    """Make a student of some of a teacher's layers (teacher-free truncation, arXiv 2305.14864), to train on from."""
    from launch.init_student import InitStudentRequest, run_init_student

    request = InitStudentRequest(
        teacher=teacher,
        output=output,
        num_layers=layers,
        strategy=keep,
        layers=keep_layers,
        random=random,
        seed=seed,
    )
    run_init_student(request, Console())


def main() -> None:
    """Entry point of `gkd`."""
    sys.path.append(str(Path.cwd()))  # plug-ins may lie where the command runs, as for `python -m`
    run_command(app)


def run_command(command: Callable[[], None]) -> None:
    """Run a command: user mistakes become one message and exit code 2, an interrupted run exit code 130."""
    try:
        command()
    except UserError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {_escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(2)
    except Interrupted as error:
        typer.echo(str(error), err=True)
        sys.exit(130)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


if __name__ == "__main__":
    main()
