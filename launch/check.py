"""`gkd check`: the preflight alone."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gkd.config import Config
from launch.memory import estimate
from launch.models import ModelFacts
from launch.offline import check_offline
from launch.placement import Place, needed_places, plan_placement
from launch.preflight import Facts, check
from launch.ray_session import joins_cluster, ray_session, resources
from launch.run_folder import find_start
from launch.signal_cache import not_stored, scored_texts
from launch.stages import stage_names
from launch.wire import wire_between
from launch.worker_table import worker_table
from rollout.tokenized import TokenizedData

_OF_THE_STUDENT = {
    "student_base": "the student's base, its adapter off",
    "student_ema": "the moving average of the student's weights",
}
"""Backend -> what the teacher is."""


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
        start = find_start(config, facts.fingerprints)
        rows.append(("starts after step", f"{start.completed_steps:,}" + (" (finished)" if start.finished else "")))
    rows.append(("weights travel by", wire if config.needs_engine else "nothing: no engine runs"))
    on_gpus = any(place.num_gpus for place in places)
    table = Table(title=f"{config.run.name}: {'ready' if facts else 'checked in part'}", show_header=False)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(worker_table(places, estimate(config, sizes, on_gpu=on_gpus) if sizes else []))
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
        return [("student", config.student.model), ("teacher", "\n".join(_teachers(config, ())))]
    student = facts.student
    return [
        ("student", f"{student.path} ({student.head_rows:,} rows, {_first_weights(config, facts)})"),
        ("teacher", "\n".join(_teachers(config, facts.teachers))),
        ("vocabulary in the loss", f"{facts.rows:,} rows"),
        *_of_the_records(config, [stage.data for stage in facts.stages]),
        *_of_the_caches(config, facts),
    ]


def _of_the_records(config: Config, stages: Sequence[TokenizedData]) -> list[tuple[str, str]]:
    if all(data.block_tokens is not None for data in stages):
        blocks = [f"{len(data.records):,} blocks of {data.block_tokens:,} tokens" for data in stages]
        return [("training text", _each(config, blocks))]
    return [
        ("training records", _each(config, [_counts(data) for data in stages])),
        ("longest prompt", _each(config, [f"{data.longest_prompt:,} tokens" for data in stages])),
    ]


def _counts(data: TokenizedData) -> str:
    if data.block_tokens is not None:
        return f"{len(data.records):,} blocks of {data.block_tokens:,} tokens"
    return f"{len(data.records):,} used, {data.num_overlong:,} too long"


def _each(config: Config, texts: Sequence[str]) -> str:
    """A line for each stage; the only one as it is."""
    names = stage_names(config)
    return "\n".join(f"{name}: {text}" for name, text in zip(names, texts, strict=True)) if names else texts[0]


def _first_weights(config: Config, facts: Facts) -> str:
    """Where the student's first weights come from."""
    if config.student.init == "truncate":
        return f"truncated to {facts.sizes.student.num_layers} layers"
    return f"{config.student.init} weights"


def _of_the_caches(config: Config, facts: Facts) -> list[tuple[str, str]]:
    texts = scored_texts(config, [stage.data for stage in facts.stages])
    if not any(facts.caches) or not texts:
        return []
    num_stored = len(texts) - len(not_stored(facts.caches, texts))
    return [("samples in the caches", f"{num_stored:,} of {len(texts):,}")]


def _teachers(config: Config, found: Sequence[ModelFacts]) -> list[str]:
    """A line for each teacher."""
    if not config.uses_teacher:
        return ["none"]
    lines = [_OF_THE_STUDENT.get(teacher.backend, teacher.model) for teacher in config.all_teachers]
    if found:
        lines = [f"{model.path} ({model.head_rows:,} rows)" for model in found]
    if len(lines) == 1:
        return [str(lines[0])]
    shares = [f"{weight:.3g} of the mixture" for weight in config.mixture or ()]
    named = [f"{teacher.name}: {line}" for teacher, line in zip(config.all_teachers, lines, strict=True)]
    return [f"{line}, {share}" for line, share in zip(named, shares, strict=True)] if shares else named


def _of_the_run(config: Config) -> list[tuple[str, str]]:
    steps = [f"{part.trainer.max_steps:,} of {part.trainer.batch_size:,} sequences" for part in config.parts]
    return [
        ("on-policy share", _each(config, [f"{part.on_policy_fraction:g}" for part in config.parts])),
        ("steps", _each(config, steps)),
    ]
