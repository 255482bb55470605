"""`gkd score`: teachers score the dataset's text before any run does, so that runs find their signals on disk."""

import queue
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gkd.config import Config
from gkd.errors import Interrupted, UserError
from gkd.interfaces import GroupKey, ScoredGroup
from gkd.scoring import scoring_groups
from gkd.types import Rollout
from launch.placement import fit_places, needed_places
from launch.preflight import check
from launch.ray_session import Workers, ray_session, resources
from launch.signal_cache import not_stored, scored_texts, scores_given_text
from launch.teachers import all_scores, scoring_limits, start_teachers
from rollout.teacher_router import Pool


def run_score(config: Config, console: Console) -> None:
    """Store the teachers' signals of every training record. Starts no worker where all are stored.

    Raises:
        UserError: before any worker starts, for anything that the user can mend.
        Interrupted: if it is stopped; what was scored before is stored.
    """
    _check_purpose(config)
    facts = check(config)
    for warning in facts.warnings:
        console.print(f"[yellow]note:[/] {escape(warning)}")
    texts = scored_texts(config, [stage.data for stage in facts.stages])
    missing = not_stored(facts.caches, texts)
    if missing:
        with ray_session():
            places = fit_places([p for p in needed_places(config) if p.kind == "teacher"], *resources())
            with Workers(places) as workers:
                teachers = start_teachers(config, facts, workers)
                with console.status(f"starting {', '.join(place.worker for place in places)}"):
                    workers.wait_ready(config.rollout.timeout_s)
                pool = all_scores(config, teachers, timeout_s=config.rollout.timeout_s)
                assert pool is not None, "a config without teachers was refused"
                _score(config, pool, missing, console)
    folders = ", ".join(str(cache.folder) for cache in facts.caches if cache is not None)
    console.print(f"{len(missing):,} samples scored; the signals of all {len(texts):,} are in {folders}")


def _check_purpose(config: Config) -> None:
    """There are teachers, all with a cache, and text that comes again.

    Raises:
        UserError: else.
    """
    if not config.needs_teacher_workers:
        problem, cure = "asks no teacher with workers of its own.", "Name such a teacher."
        if config.teacher_writes:
            problem, cure = "has the teacher write, and score nothing.", "Use an objective that compares with it."
        raise UserError("objective.type", config.objective.type, problem, cure)
    compared = [part for part in config.parts if part.needs_teacher]
    if all(part.teacher_writes for part in compared):
        raise UserError(
            "objective.type",
            compared[0].objective.type,
            "leaves nothing to score: the teacher writes every sample while the run goes on.",
            "Use the distill objective on the dataset's text.",
        )
    if not scores_given_text(config):
        raise UserError(
            "data.on_policy_fraction",
            config.data.on_policy_fraction,
            "leaves nothing to score: every sample that is scored is written while the run goes on.",
            "Lower it.",
        )
    for field, teacher in zip(config.teacher_fields, config.all_teachers, strict=True):
        if teacher.cache is None:
            raise UserError(f"{field}.cache", None, "is where signals are kept, and is not set.", "Name a folder.")


def _score(config: Config, pool: Pool, texts: Sequence[Rollout], console: Console) -> None:
    """Give all to the teachers, whose workers store the signals, and wait."""
    groups = scoring_groups(
        [text.teacher for text in texts], [text.num_scored_tokens for text in texts], scoring_limits(config)
    )
    callbacks: queue.Queue[Callable[[], None]] = queue.Queue()
    bar = Progress(
        TextColumn("samples"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("eta"),
        TimeRemainingColumn(), console=console,
    )  # fmt: skip
    task, waiting, num_done = bar.add_task("samples", total=len(texts)), len(groups), 0

    def stored(key: GroupKey, _: ScoredGroup) -> None:
        nonlocal waiting, num_done
        waiting -= 1
        num_done += len(groups[key[1]])
        bar.update(task, completed=num_done)

    pool.connect(callbacks.put, stored)
    try:
        with bar:
            for number, group in enumerate(groups):
                pool.submit((0, number), [texts[i] for i in group])
            while waiting:
                callbacks.get(timeout=config.rollout.timeout_s)()
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted: of {len(texts)} samples {num_done} are scored and stored") from None
    except queue.Empty:
        raise TimeoutError(
            f"no group of samples was scored in {config.rollout.timeout_s:g} s (rollout.timeout_s sets this limit)"
        ) from None
