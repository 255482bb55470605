"""Plots of the finished runs."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.methods import CONTROLS, HEADLINE, TITLES
from benchmarks.quality.results import SERIES_EVERY, Result


def plot(results: Sequence[Result], path: Path) -> None:
    """Four panels of the runs with clean labels and teacher 0.

    Exact match of every student; reverse KL along its own samples and exact match over the tokens trained on, of the
    headline methods and controls; the distances that moment matching logged, over its steps.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [result for result in results if (result.cell.setting, result.cell.teacher) == ("clean", 0)]
    runs = {method: [result for result in shown if result.cell.method == method] for method in TITLES}
    runs = {method: members for method, members in runs.items() if members}
    if not runs:
        return
    main = {method: members for method, members in runs.items() if method in HEADLINE or method in CONTROLS}
    heights = (0.3 * len(runs) + 1, 4.5, 4.5, 4.5)
    figure, panels = pyplot.subplots(4, 1, figsize=(10, sum(heights)), height_ratios=heights, layout="constrained")
    _students(panels[0], runs)
    _positions(panels[1], main)
    _curves(panels[2], main)
    _distances(panels[3], runs)
    for panel in panels:
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1))
    panels[3].set_visible(bool(panels[3].lines))  # nothing to show before moment matching has run
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _students(panel: Any, runs: dict[str, list[Result]]) -> None:
    for place, members in enumerate(runs.values()):
        values = [result.after["exact_match"] for result in members]
        panel.plot(values, [place] * len(values), "o", alpha=0.4, color="C0")
        panel.plot([statistics.fmean(values)], [place], "|", markersize=14, color="black")
    panel.set(yticks=range(len(runs)), yticklabels=[TITLES[method] for method in runs], xlabel="exact match (greedy)")
    panel.invert_yaxis()


def _positions(panel: Any, runs: dict[str, list[Result]]) -> None:
    common = set.intersection(*({result.cell.seed for result in members} for members in runs.values()))
    for method, of_all in runs.items():
        members = [result for result in of_all if result.cell.seed in common] or of_all
        means = _means([result.after["reverse_kl_by_position"] for result in members])
        # A total has two digits and a separator, which is certain: the mean of three places shows what changes.
        smooth = [statistics.fmean(means[place : place + 3]) for place in range(len(means) - 2)]
        style = "-" if method in HEADLINE else ":"
        panel.plot(range(2, len(smooth) + 2), smooth, style, label=TITLES[method])
    panel.set(
        xlabel="position in the student's own samples (mean of three; students that all methods have)",
        ylabel="reverse KL to the teacher (nats)",
        yscale="log",
    )


def _curves(panel: Any, runs: dict[str, list[Result]]) -> None:
    for method, members in runs.items():
        curves = [result.curve for result in members if result.curve]
        if curves:
            tokens, matches = (_means([[point[axis] for point in curve] for curve in curves]) for axis in (0, 1))
            style = "o-" if method in HEADLINE else "o:"
            panel.plot(tokens, matches, style, label=f"{TITLES[method]} ({len(curves)})")
    panel.set(xlabel="tokens trained on", ylabel="exact match (greedy), mean of the students")


def _distances(panel: Any, runs: dict[str, list[Result]]) -> None:
    matching = [method for method, members in runs.items() if any(result.series for result in members)]
    for colour, method in enumerate(matching):
        for side, style in (("d_on", "-"), ("d_off", "--")):
            series = [result.series[side] for result in runs[method] if side in result.series]
            if series:
                means = _means(series)
                steps = range(1, SERIES_EVERY * len(means), SERIES_EVERY)
                panel.plot(steps, means, style, label=f"{TITLES[method]}: {side}", color=f"C{colour}")
    panel.set(xlabel="step", ylabel="distance, as the run's critics see it")
    panel.set_yscale("symlog", linthresh=0.1)  # students that collapse are 20 times as far as the others


def _means(rows: Sequence[Sequence[float]]) -> list[float]:
    """Place by place, as far as all rows go."""
    return [statistics.fmean(values) for values in zip(*rows, strict=False)]
