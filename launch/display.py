"""What a user sees while a run goes on: a live panel on a terminal, plain lines elsewhere."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from launch.bottleneck import Bottleneck, Waits

_PLAIN_EVERY_S = 5.0


class Display(Protocol):
    """Shows each step's metrics, while it is open."""

    def __enter__(self) -> "Display": ...

    def __exit__(self, *_: object) -> None: ...

    def show(self, metrics: dict[str, Any]) -> None:
        """Show one step."""
        ...


def make_display(
    console: Console, name: str, completed_steps: int, max_steps: int, *, stages: Sequence[str]
) -> Display:
    """A live panel where the console is a terminal, else plain lines; `stages` are the names of a run's stages."""
    kind = LiveDisplay if console.is_terminal else PlainDisplay
    return kind(console, name, completed_steps, max_steps, stages)


class PlainDisplay:
    """A line every few seconds, for logs."""

    def __init__(
        self, console: Console, name: str, completed_steps: int, max_steps: int, stages: Sequence[str]
    ) -> None:
        self._console = console
        self._stages = stages
        self._name = name
        self._first_step = completed_steps
        self._max_steps = max_steps
        self._last_line = 0.0
        self._waits = Waits()

    def __enter__(self) -> "PlainDisplay":
        self._started = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        """Say what bounded the steps."""
        _print_bottleneck(self._console, self._name, self._waits.bottleneck())

    def show(self, metrics: dict[str, Any]) -> None:
        """A line, if the last one is old enough or this is the last step."""
        self._waits.add(metrics)
        step, now = metrics["step"], time.monotonic()
        if now - self._last_line < _PLAIN_EVERY_S and step != self._max_steps:
            return
        self._last_line = now
        facts = "  ".join(f"{name} {value}" for name, value in _facts(metrics, self._stages, self._waits.bottleneck()))
        seconds = (now - self._started) / (step - self._first_step) * (self._max_steps - step)
        self._console.print(
            f"{self._name}  step {step}/{self._max_steps}  {facts}  eta {seconds // 60:.0f}:{seconds % 60:02.0f}",
            soft_wrap=True,
            highlight=False,
        )


class LiveDisplay:
    """A progress bar and a table that stay in place."""

    def __init__(
        self, console: Console, name: str, completed_steps: int, max_steps: int, stages: Sequence[str]
    ) -> None:
        self._console = console
        self._name = name
        self._stages = stages
        self._waits = Waits()
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("step {task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task(name, total=max_steps, completed=completed_steps)
        self._live = Live(self._progress, console=console, refresh_per_second=4)

    def __enter__(self) -> "LiveDisplay":
        self._progress.reset(self._task, completed=int(self._progress.tasks[0].completed))
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()
        _print_bottleneck(self._console, self._name, self._waits.bottleneck())

    def show(self, metrics: dict[str, Any]) -> None:
        """Redraw with this step."""
        self._waits.add(metrics)
        table = Table(box=None, padding=(0, 2))
        facts = _facts(metrics, self._stages, self._waits.bottleneck())
        for name, _ in facts:
            table.add_column(name, justify="right")
        table.add_row(*(value for _, value in facts))
        self._progress.update(self._task, completed=metrics["step"])
        self._live.update(Group(self._progress, table))


class TensorBoard:
    """Writes every number of a step into TensorBoard's event files."""

    def __init__(self, folder: Path, completed_steps: int) -> None:
        """`folder` holds the event files; what they know of later steps is given up."""
        self._folder = folder
        self._first_step = completed_steps + 1

    def __enter__(self) -> "TensorBoard":
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=self._first_step)
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def show(self, metrics: dict[str, Any]) -> None:
        """Add this step."""
        for name, value in metrics.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, metrics["step"])


def _print_bottleneck(console: Console, name: str, found: Bottleneck | None) -> None:
    if found is not None:
        console.print(f"{name}: {found}", soft_wrap=True, highlight=False)


def _facts(metrics: dict[str, Any], stages: Sequence[str], found: Bottleneck | None) -> list[tuple[str, str]]:
    """The few facts worth watching: the stage of a run that has several, the loss, the on-policy share, the tokens per
    second of each kind of worker, the gap, and what bounds the steps so far."""
    gap = metrics["sync/logprob_gap_max"]
    evaluated = [(name.removeprefix("eval/"), f"{metrics[name]:.4f}") for name in metrics if name.startswith("eval/")]
    return [
        *([("stage", stages[metrics["stage"]])] if stages else []),
        ("loss", f"{metrics['loss/total']:.4f}"),
        ("on-policy", f"{metrics['source/on_policy']:.0%}"),
        ("rollout tok/s", _rate(metrics["tokens/generated"], metrics["time/rollout_s"])),
        ("teacher tok/s", _rate(metrics["tokens/trained"], metrics["time/teacher_s"])),
        ("train tok/s", _rate(metrics["tokens/trained"], metrics["time/train_s"])),
        ("gap", "-" if gap is None else f"{gap:.1e}"),
        ("step s", f"{metrics['time/step_s']:.2f}"),
        ("bound by", found.stage if found else "-"),
        *evaluated,
    ]


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:,.0f}" if seconds > 0 and tokens else "-"
