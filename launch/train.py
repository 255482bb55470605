"""`gkd train`: one run from preflight to export."""

import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.markup import escape

from gkd.config import Config
from launch.build import build_parts, build_span
from launch.display import Display, TensorBoard, make_display
from launch.placement import Place, plan_placement
from launch.preflight import check
from launch.ray_session import Workers, joins_cluster, ray_session, resources
from launch.run_folder import find_start, mark_export, prepare
from launch.stages import stage_names
from launch.student_start import first_student
from launch.trace import NoTrace, Trace
from launch.wire import wire_between
from trainer.loop import train


def run_training(config: Config, console: Console, *, open_workers: Callable[[list[Place]], Workers] = Workers) -> Path:
    """Train, and export the student. Returns the exported model's folder.

    Args:
        config: the run's.
        console: where progress is shown.
        open_workers: reserves the workers' places and starts the workers there, or lends some that are up.

    Raises:
        UserError: before any worker starts, for anything that the user can mend.
        Interrupted: after a checkpoint, if a signal asked to stop.
    """
    export = config.run.output_dir.absolute() / "export"
    facts = check(config)
    start = find_start(config, facts.fingerprints)
    if start.finished:
        console.print(f"{config.run.name}: finished before; the model is in {export}")
        return export
    if not joins_cluster():
        # What does not fit this host is refused before Ray starts.
        wire_between(config, plan_placement(config, *resources()))
    for warning in facts.warnings:
        console.print(f"[yellow]note:[/] {escape(warning)}")

    with ray_session():
        places = plan_placement(config, *resources())
        wire_between(config, places)
        prepare(config, start)
        facts = replace(facts, student=first_student(config, facts.student))
        if start.checkpoint is not None:
            console.print(f"{config.run.name}: going on after step {start.completed_steps}")
        with open_workers(places) as workers, _stop_on_signal(console) as stop_requested:
            trace = _trace(config)
            displays: list[Display] = [
                make_display(
                    console,
                    config.run.name,
                    start.completed_steps,
                    config.trainer.max_steps,
                    stages=stage_names(config),
                ),
                trace,
            ]
            if config.log.tensorboard:
                displays.append(TensorBoard(config.run.output_dir / "tensorboard", start.completed_steps))

            def show(metrics: dict[str, Any]) -> None:
                for display in displays:
                    display.show(metrics)

            with console.status(f"{config.run.name}: starting {', '.join(place.worker for place in places)}"):
                parts = build_parts(
                    config,
                    facts,
                    start,
                    workers,
                    trace,
                    report=show,
                    warn=lambda text: console.print(f"[yellow]warning:[/] {escape(text)}"),
                    stop_requested=stop_requested,
                )
            with ExitStack() as open_displays:
                for display in displays:
                    open_displays.enter_context(display)
                train(parts, build_span(config, facts, start))
            _export(parts.learner.export, export, step=max(config.trainer.max_steps, start.completed_steps))
    console.print(f"{config.run.name}: done; the model is in {export}")
    return export


def _trace(config: Config) -> Trace | NoTrace:
    if not config.log.trace:
        return NoTrace()
    return Trace(config.run.output_dir.absolute() / "trace.json", timeout_s=config.rollout.timeout_s)


def _export(export: Callable[[Path], None], folder: Path, *, step: int) -> None:
    """Write the model aside, then rename: a folder named `export` is always whole."""
    temporary = folder.with_name("export.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    export(temporary)
    mark_export(temporary, step)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


@contextmanager
def _stop_on_signal(console: Console) -> Iterator[Callable[[], bool]]:
    """The first SIGINT or SIGTERM asks for a checkpoint after the step; a second one ends the process at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop.is_set
        return

    def request(number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            raise SystemExit(1)  # without a checkpoint, so not 130
        stop.set()
        console.print(f"{signal.Signals(number).name}: saving after this step (once more to stop at once)")

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
