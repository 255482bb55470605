"""Plots of the finished runs."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.methods import TITLES
from benchmarks.quality.results import Result


def plot(results: Sequence[Result], path: Path) -> None:
    """Exact match of every student, and the reverse KL along its own samples, with clean labels and teacher 0."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [result for result in results if (result.cell.setting, result.cell.teacher) == ("clean", 0)]
    methods = [method for method in TITLES if any(result.cell.method == method for result in shown)]
    if not methods:
        return
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 0.35 * len(methods) + 3), layout="constrained")
    for place, method in enumerate(methods):
        runs = [result for result in shown if result.cell.method == method]
        values = [result.after["exact_match"] for result in runs]
        left.plot(values, [place] * len(values), "o", alpha=0.5, color=f"C{place % 10}")
        left.plot([statistics.fmean(values)], [place], "|", markersize=16, color="black")
        curves = [result.after["reverse_kl_by_position"] for result in runs]
        length = min(len(curve) for curve in curves)
        means = [statistics.fmean(curve[position] for curve in curves) for position in range(length)]
        right.plot(range(1, length + 1), means, label=TITLES[method], color=f"C{place % 10}")
    left.set(yticks=range(len(methods)), yticklabels=[TITLES[m] for m in methods], xlabel="exact match (greedy)")
    left.invert_yaxis()
    left.grid(axis="x", alpha=0.3)
    right.set(xlabel="position in the student's own samples", ylabel="reverse KL to the teacher (nats)")
    right.legend(fontsize="small")
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
