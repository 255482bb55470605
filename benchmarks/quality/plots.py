"""Plots of the finished runs."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.methods import HEADLINE, TITLES
from benchmarks.quality.results import SERIES_EVERY, Result


def plot(results: Sequence[Result], path: Path) -> None:
    """Four panels of the runs with clean labels and teacher 0.

    Exact match of every student; reverse KL along its own samples; exact match over the tokens trained on, of the
    headline methods; the distances that moment matching logged, over its steps.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [result for result in results if (result.cell.setting, result.cell.teacher) == ("clean", 0)]
    runs = {method: [result for result in shown if result.cell.method == method] for method in TITLES}
    runs = {method: members for method, members in runs.items() if members}
    if not runs:
        return
    figure, panels = pyplot.subplots(2, 2, figsize=(13, 0.35 * len(runs) + 8), layout="constrained")
    colours = {method: f"C{place % 10}" for place, method in enumerate(runs)}
    _students(panels[0, 0], runs, colours)
    _positions(panels[0, 1], runs, colours)
    _curves(panels[1, 0], {method: members for method, members in runs.items() if method in HEADLINE}, colours)
    _distances(panels[1, 1], runs, colours)
    for panel in panels.flat:
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize="small", ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    panels[1, 1].set_visible(bool(panels[1, 1].lines))  # nothing to show before moment matching has run
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _students(panel: Any, runs: dict[str, list[Result]], colours: dict[str, str]) -> None:
    for place, (method, members) in enumerate(runs.items()):
        values = [result.after["exact_match"] for result in members]
        panel.plot(values, [place] * len(values), "o", alpha=0.5, color=colours[method])
        panel.plot([statistics.fmean(values)], [place], "|", markersize=16, color="black")
    panel.set(yticks=range(len(runs)), yticklabels=[TITLES[method] for method in runs], xlabel="exact match (greedy)")
    panel.invert_yaxis()


def _positions(panel: Any, runs: dict[str, list[Result]], colours: dict[str, str]) -> None:
    for method, members in runs.items():
        means = _means([result.after["reverse_kl_by_position"] for result in members])
        style = "-" if method in HEADLINE else ":"
        panel.plot(range(1, len(means) + 1), means, style, label=TITLES[method], color=colours[method])
    panel.set(xlabel="position in the student's own samples", ylabel="reverse KL to the teacher (nats)", yscale="log")


def _curves(panel: Any, runs: dict[str, list[Result]], colours: dict[str, str]) -> None:
    for method, members in runs.items():
        curves = [result.curve for result in members if result.curve]
        if curves:
            tokens, matches = (_means([[point[axis] for point in curve] for curve in curves]) for axis in (0, 1))
            panel.plot(tokens, matches, "o-", label=f"{TITLES[method]} ({len(curves)})", color=colours[method])
    panel.set(xlabel="tokens trained on", ylabel="exact match (greedy), mean of the students")


def _distances(panel: Any, runs: dict[str, list[Result]], colours: dict[str, str]) -> None:
    for method, members in runs.items():
        for side, style in (("d_on", "-"), ("d_off", "--")):
            series = [result.series[side] for result in members if side in result.series]
            if series:
                means = _means(series)
                steps = range(1, SERIES_EVERY * len(means), SERIES_EVERY)
                panel.plot(steps, means, style, label=f"{TITLES[method]}: {side}", color=colours[method])
    panel.set(xlabel="step", ylabel="distance to the teacher, as the run's critics see it")


def _means(rows: Sequence[Sequence[float]]) -> list[float]:
    """Place by place, as far as all rows go."""
    return [statistics.fmean(values) for values in zip(*rows, strict=False)]
