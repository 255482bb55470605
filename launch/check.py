"""`gkd check`: the preflight alone."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gkd.config import Config
from launch.memory import estimate
from launch.offline import check_offline
from launch.placement import Place, needed_places, plan_placement
from launch.plan_table import plan_table
from launch.preflight import Facts, check
from launch.ray_session import joins_cluster, ray_session, resources
from launch.run_folder import find_start
from launch.wire import wire_between


def run_check(config: Config, console: Console, *, offline: bool) -> None:
    """Check a config and show what it would do.

    Args:
        config: the run's.
        console: where it is shown.
        offline: leave out what is not on this host, and show what the run needs instead of what this host can give.

    Raises:
        UserError: for the first thing found wrong.
    """
    if offline:
        found = check_offline(config)
        facts, sizes, notes, places = found.facts, found.sizes, found.notes, needed_places(config)
    else:
        facts = check(config)
        sizes, notes, places = facts.sizes, facts.warnings, _plan(config)
    wire = wire_between(config, places)
    rows = [*_of_the_data(config, facts), *_of_the_run(config)]
    if facts is not None:
        start = find_start(config, facts.data_fingerprint)
        rows.append(("starts after step", f"{start.completed_steps:,}" + (" (finished)" if start.finished else "")))
    rows.append(("weights travel by", wire if config.needs_engine else "nothing: no engine runs"))
    on_gpus = any(place.num_gpus for place in places)
    table = Table(title=f"{config.run.name}: {'ready' if facts else 'checked in part'}", show_header=False)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(plan_table(places, estimate(config, sizes, on_gpu=on_gpus) if sizes else []))
    for note in notes:
        console.print(f"[yellow]note:[/] {escape(note)}", highlight=False)


def _plan(config: Config) -> list[Place]:
    if not joins_cluster():
        return plan_placement(config, *resources())
    with ray_session():
        return plan_placement(config, *resources())


def _of_the_data(config: Config, facts: Facts | None) -> list[tuple[str, str]]:
    """What is known of models and data, as (name, value) pairs."""
    if facts is None:
        return [("student", config.student.model), ("teacher", _teacher(config))]
    student, teacher, data = facts.student, facts.teacher, facts.data
    return [
        ("student", f"{student.path} ({student.head_rows:,} rows, {config.student.init} weights)"),
        ("teacher", f"{teacher.path} ({teacher.head_rows:,} rows)" if teacher else _teacher(config)),
        ("vocabulary in the loss", f"{facts.rows:,} rows"),
        ("training records", f"{len(data.records):,} used, {data.num_overlong:,} too long"),
        ("longest prompt", f"{data.longest_prompt:,} tokens"),
    ]


def _teacher(config: Config) -> str:
    if not config.needs_teacher or config.teacher is None:
        return "none"
    return config.teacher.model or "the student's base, its adapter off"


def _of_the_run(config: Config) -> list[tuple[str, str]]:
    return [
        ("on-policy share", f"{config.on_policy_fraction:g}"),
        ("steps", f"{config.trainer.max_steps:,} of {config.trainer.batch_size:,} sequences"),
    ]
