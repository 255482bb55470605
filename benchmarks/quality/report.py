"""Tables and plots of the finished runs."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality.methods import TITLES
from benchmarks.quality.plan import STEPS, chosen_rate
from benchmarks.quality.plots import plot
from benchmarks.quality.results import Result

PAGE = Path("docs/RESULTS.md")
_BEGIN, _END = "<!-- measured: begin -->", "<!-- measured: end -->"

PAIRS = (
    ("gkd_reverse_kl", "kd_reverse_kl"),
    ("gkd_jsd_0.5", "kd_jsd_0.5"),
    ("gkd_forward_kl", "kd"),
    ("gkd_reverse_kl", "kd"),
    ("gkd_jsd_0.5", "kd"),
    ("kd", "sft"),
    ("gkd_jsd_0.5", "sft"),
)
"""Differences that are taken between runs of one warm start, the first minus the second."""

_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""97.5 % points of Student's t with 1, 2, ... degrees of freedom."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A paired difference of exact match."""

    setting: str
    """`clean` or `noisy`."""
    first: str
    """A method."""
    second: str
    """Another."""
    mean: float
    """Over the students."""
    interval: tuple[float, float] | None
    """95 % by Student's t over the students; None of one student."""
    positive: int
    """Students whose difference is above 0."""
    students: int
    """Warm starts that both began with."""


def differences(results: Sequence[Result]) -> list[Difference]:
    """Of every pair that has students, at equal steps, over all teachers of a setting."""
    found = []
    for setting in ("clean", "noisy"):
        for first, second in PAIRS:
            of_each = [_by_start(results, setting, method) for method in (first, second)]
            both = sorted(of_each[0].keys() & of_each[1].keys())
            if both:
                values = [of_each[0][start] - of_each[1][start] for start in both]
                found.append(_difference(setting, first, second, values))
    return found


def _by_start(results: Sequence[Result], setting: str, method: str) -> dict[tuple[str, int], float]:
    """(warm start, teacher) -> exact match after it."""
    return {
        (result.warm, result.cell.teacher): result.after["exact_match"]
        for result in _final(results)
        if (result.cell.setting, result.cell.method) == (setting, method)
    }


def _final(results: Sequence[Result]) -> list[Result]:
    """Test runs at equal steps."""
    return [result for result in results if result.cell.split == "test" and result.cell.steps == STEPS]


def _difference(setting: str, first: str, second: str, values: Sequence[float]) -> Difference:
    mean, interval = statistics.fmean(values), None
    if len(values) > 1:
        reach = _T_975[min(len(values) - 1, len(_T_975)) - 1] * statistics.stdev(values) / len(values) ** 0.5
        interval = (mean - reach, mean + reach)
    return Difference(
        setting=setting,
        first=first,
        second=second,
        mean=mean,
        interval=interval,
        positive=sum(value > 0 for value in values),
        students=len(values),
    )


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
            | {name: _mean_and_spread(members, name) for name in _COLUMNS}
            | {name: statistics.median(m.metrics[name] for m in members) for name in ("tokens", "train_s", "step_s")}
        )
    pairs = [asdict(pair) for pair in differences(results)]
    rates = {method: rate for method in TITLES if (rate := chosen_rate(results, method)) is not None}
    return {"runs": len(results), "learning_rates": rates, "methods": rows, "differences": pairs}


_COLUMNS = {
    "exact_match": "exact match",
    "reverse_kl": "reverse KL, own samples",
    "dataset_forward_kl": "forward KL, right answers",
    "total_variation": "TV, own samples",
    "entropy": "entropy, own samples",
}


def _mean_and_spread(members: Sequence[Result], name: str) -> dict[str, float | None]:
    values = [member.after[name] for member in members]
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}


def write(results: Sequence[Result], folder: Path) -> None:
    """`summary.json` and the plots in `folder`, and the tables into the page."""
    numbers = summary(results)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    plot(_final(results), Path("docs/results.png"))
    before, rest = PAGE.read_text(encoding="utf-8").split(_BEGIN)
    after = rest.split(_END)[1]
    PAGE.write_text(f"{before}{_BEGIN}\n{_tables(numbers)}\n{_END}{after}", encoding="utf-8")


def _tables(numbers: dict[str, Any]) -> str:
    lines = [f"{numbers['runs']} runs are in `benchmarks/results/quality.jsonl`.", ""]
    groups = sorted({(row["setting"], row["teacher"]) for row in numbers["methods"]})
    for setting, teacher in groups:
        rows = [row for row in numbers["methods"] if (row["setting"], row["teacher"]) == (setting, teacher)]
        lines += [f"### Labels {setting}, teacher {teacher}", ""]
        lines += ["| method | steps | students | learning rate | before | " + " | ".join(_COLUMNS.values()) + " | s |"]
        lines += ["|---|---|---|---|---|" + "---|" * (len(_COLUMNS) + 1)]
        lines += [_row(row) for row in sorted(rows, key=lambda row: -row["exact_match"]["mean"])] + [""]
    if numbers["differences"]:
        lines += ["### Paired differences of exact match, from one warm start", ""]
        lines += ["| labels | difference | mean | 95 % interval | above 0 |", "|---|---|---|---|---|"]
        lines += [_difference_row(pair) for pair in numbers["differences"]]
    return "\n".join(lines)


def _row(row: dict[str, Any]) -> str:
    cells = [
        f"{row[name]['mean']:.3f}" + (f" ± {row[name]['sd']:.3f}" if row[name]["sd"] is not None else "")
        for name in _COLUMNS
    ]
    first = [TITLES[row["method"]], str(row["steps"]), str(len(row["seeds"])), f"{row['learning_rate']:g}"]
    return "| " + " | ".join([*first, f"{row['exact_match_before']:.3f}", *cells, f"{row['train_s']:.0f}"]) + " |"


def _difference_row(pair: dict[str, Any]) -> str:
    interval = "-" if pair["interval"] is None else f"{pair['interval'][0]:+.3f} to {pair['interval'][1]:+.3f}"
    name = f"{TITLES[pair['first']]} - {TITLES[pair['second']]}"
    counted = f"{pair['positive']} of {pair['students']}"
    return f"| {pair['setting']} | {name} | {pair['mean']:+.3f} | {interval} | {counted} |"
