"""What measurements come to: a file, lines for docs/PERFORMANCE.md, a picture."""

import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    return {"cpus": os.cpu_count(), "processor": platform.machine(), "torch": torch.__version__}


def publish(
    found: Mapping[str, Any],
    output: Path,
    *,
    table: Callable[[Mapping[str, Any]], list[str]],
    plot: Callable[[Mapping[str, Any], Path], None],
) -> None:
    """Write what was found to `output`, its picture beside that, and print its lines."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    plot(found, output.with_suffix(".png"))
    print(*table(found), sep="\n")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


@contextmanager
def panels(path: Path, number: int, *, width: float, one_scale: bool = False) -> Iterator[Sequence[Any]]:
    """Some panels side by side, so many inches wide each, to be drawn into; then they are saved. `one_scale`: with one
    vertical scale for all."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (width * number, 4.2)
    figure, axes = pyplot.subplots(1, number, figsize=size, sharey=one_scale, layout="constrained", squeeze=False)
    yield axes[0]
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
