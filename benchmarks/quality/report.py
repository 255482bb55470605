"""Tables and plots of the finished runs."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.quality.differences import (
    ACCURACY,
    IN_EQUAL_TIME,
    OF_OTHERS,
    RELATIONS,
    WARM,
    differences,
    equal_steps,
    equal_time,
)
from benchmarks.quality.methods import TITLES
from benchmarks.quality.plan import chosen_rate
from benchmarks.quality.plots import plot
from benchmarks.quality.results import Result
from benchmarks.quality.task import SETTINGS, SORTING
from benchmarks.truncation_tables import finished

PAGE = Path("docs/RESULTS.md")
_BEGIN, _END = "<!-- measured: begin -->", "<!-- measured: end -->"


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """Everything that the page says, as numbers."""
    rows = []
    groups: dict[tuple[str, int, str, int], list[Result]] = {}
    for result in results:
        if result.cell.split == "test":
            cell = result.cell
            groups.setdefault((cell.setting, cell.teacher, cell.method, cell.steps), []).append(result)
    for (setting, teacher, method, steps), members in sorted(groups.items()):
        rows.append(
            {"setting": setting, "teacher": teacher, "method": method, "steps": steps}
            | {"seeds": [member.cell.seed for member in members], "learning_rate": members[0].cell.learning_rate}
            | {"exact_match_before": statistics.fmean(member.before["exact_match"] for member in members)}
            | {name: _mean_and_spread(members, name) for name in _columns(setting)}
            | {name: statistics.median(m.metrics[name] for m in members) for name in ("tokens", "train_s", "step_s")}
        )
    compared = {
        name: [asdict(pair) for pair in differences(runs, comparisons) if _is_measured(pair.setting, pair.metric)]
        for name, runs, comparisons in (
            ("differences", equal_steps(results), ACCURACY),
            ("differences_of_others", equal_steps(results), OF_OTHERS),
            ("differences_in_equal_time", equal_time(results), IN_EQUAL_TIME),
            ("relations", equal_steps(results), RELATIONS),
        )
    }
    rates = {method: rate for method in TITLES if (rate := chosen_rate(results, method)) is not None}
    return {"runs": len(results), "learning_rates": rates, "methods": rows} | compared


def write_summary(numbers: dict[str, Any], folder: Path) -> None:
    """`summary.json`: of the objectives' comparison these numbers, and the finished runs of the truncation's."""
    folder.mkdir(parents=True, exist_ok=True)
    truncated = [asdict(run) | {"recovered": run.recovered} for run in finished()]
    path = folder / "summary.json"
    path.write_text(json.dumps(numbers | {"truncation": truncated}, indent=1) + "\n", encoding="utf-8")


_COLUMNS = {
    "exact_match": "exact match",
    "reverse_kl": "reverse KL, own samples",
    "dataset_forward_kl": "forward KL, right answers",
    "total_variation": "TV, own samples",
    "entropy": "entropy, own samples",
    "d_on": "d_on",
    "d_off": "d_off",
}
_STEPWISE = {"whole_match": "whole trace right", "sampled_recovered": "right after a mistake, samples"}
"""Where an answer may be right after a mistake on the way to it."""

_DIFFERENCES = {
    "differences": "Paired differences of exact match, from one warm start",
    "differences_of_others": "The same of the methods with three students",
    "differences_in_equal_time": "The same in equal time, the second of each with more steps",
}


def _is_measured(setting: str, metric: str) -> bool:
    """Whether a metric says anything there: where only whole answers count, nothing is right after a mistake."""
    return metric not in _STEPWISE or SETTINGS[setting].task is SORTING


def _columns(setting: str) -> dict[str, str]:
    return _COLUMNS | (_STEPWISE if SETTINGS[setting].task is SORTING else {})


def _mean_and_spread(members: Sequence[Result], name: str) -> dict[str, float | None]:
    values = [member.after[name] for member in members]
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}


def write(results: Sequence[Result], folder: Path) -> None:
    """`summary.json` in `folder`, the plots, and the tables into the page."""
    numbers = summary(results)
    write_summary(numbers, folder)
    plot(equal_steps(results), Path("docs/results.png"))
    before, rest = PAGE.read_text(encoding="utf-8").split(_BEGIN)
    after = rest.split(_END)[1]
    PAGE.write_text(f"{before}{_BEGIN}\n{_tables(numbers)}\n{_END}{after}", encoding="utf-8")


def _tables(numbers: dict[str, Any]) -> str:
    lines = [f"{numbers['runs']} runs are in `benchmarks/results/quality.jsonl`.", ""]
    if any((row["setting"], row["teacher"]) == ("clean", 0) for row in numbers["methods"]):
        lines += ["![Exact match, reverse KL by position, curves over tokens, distances over steps](results.png)", ""]
    if not numbers["methods"]:
        lines += ["All of them are for the choice of learning rates: no method is compared yet."]
    groups = sorted({(row["setting"], row["teacher"]) for row in numbers["methods"]})
    for setting, teacher in groups:
        rows = [row for row in numbers["methods"] if (row["setting"], row["teacher"]) == (setting, teacher)]
        titles = _columns(setting).values()
        lines += [f"### Setting {setting}, teacher {teacher}", ""]
        lines += ["| method | steps | students | learning rate | before | " + " | ".join(titles) + " | s |"]
        lines += ["|---|---|---|---|---|" + "---|" * (len(titles) + 1)]
        # Means of other students are no rank: students differ more than methods.
        ordered = sorted(rows, key=lambda row: (-len(row["seeds"]), -row["exact_match"]["mean"]))
        lines += [*map(_row, ordered), ""]
    for name, title in _DIFFERENCES.items():
        if numbers[name]:
            lines += [f"### {title}", ""]
            lines += ["| setting | difference | mean | 95 % interval | above 0 |", "|---|---|---|---|---|"]
            lines += [f"| {pair['setting']} {_difference_cells(pair)}" for pair in numbers[name]] + [""]
    if numbers["relations"]:
        lines += ["### What the methods are said to show", ""]
        lines += ["| setting | claim | metric | difference | mean | 95 % interval | above 0 | found |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        lines += [
            f"| {pair['setting']} | {pair['claim']} | {pair['metric']} {_difference_cells(pair)} {_verdict(pair)} |"
            for pair in numbers["relations"]
        ]
    return "\n".join(lines)


def _row(row: dict[str, Any]) -> str:
    cells = [
        f"{row[name]['mean']:.3f}" + (f" ± {row[name]['sd']:.3f}" if row[name]["sd"] is not None else "")
        for name in _columns(row["setting"])
    ]
    first = [TITLES[row["method"]], str(row["steps"]), str(len(row["seeds"])), f"{row['learning_rate']:g}"]
    return "| " + " | ".join([*first, f"{row['exact_match_before']:.3f}", *cells, f"{row['train_s']:.0f}"]) + " |"


def _difference_cells(pair: dict[str, Any]) -> str:
    interval = "-" if pair["interval"] is None else f"{pair['interval'][0]:+.3f} to {pair['interval'][1]:+.3f}"
    name = f"{_title(pair['first'])} - {_title(pair['second'])}"
    return f"| {name} | {pair['mean']:+.3f} | {interval} | {pair['positive']} of {pair['students']} |"


def _title(method: str) -> str:
    return "warm start" if method == WARM else TITLES[method]


def _verdict(pair: dict[str, Any]) -> str:
    """Whether the expected sign came out: in every student, in their mean alone, or not."""
    if pair["expected"] is None:
        return "-"
    agree = pair["positive"] if pair["expected"] == "above" else pair["negative"]
    if agree == pair["students"]:
        return "yes, in every student"
    return "in the mean" if (pair["mean"] > 0) == (pair["expected"] == "above") else "no"
