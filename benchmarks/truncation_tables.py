"""What the finished runs of the truncation comparison show, as a part of docs/RESULTS.md."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TITLES = {
    "first_k": "first 3 layers",
    "both_ends": "2 first, 1 last",
    "uniform": "evenly spaced (0, 2, 5)",
    "spaced_from_first": "every other (0, 2, 4)",
    "last_k": "last 3 layers",
    "random": "random weights",
    "kd": "first 3, vanilla KD",
    "equal_flops": "first 3, the FLOPs of KD",
    "both_ends_longer": "2 first, 1 last, the FLOPs of KD",
    "spaced_longer": "every other, the FLOPs of KD",
    "then_sft": "the first row's, as many steps again",
    "then_gkd": "the first row's, then on-policy GKD",
    "scratch": "random weights, the teacher's whole budget",
    "first_k_2": "first 2 layers",
    "both_ends_2": "first and last",
    "spaced_from_first_2": "every third (0, 3)",
    "first_k_4": "first 4 layers",
    "both_ends_4": "2 first, 2 last",
    "spaced_from_first_4": "evenly from the first (0, 1, 3, 4)",
}
"""Method -> its name in the table, in the table's order."""
RESULTS = Path(__file__).parent / "results" / "truncation.jsonl"
"""A line for each finished run."""
_BEGIN, _END = "<!-- truncation: begin -->", "<!-- truncation: end -->"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A finished run; the fields are the columns of the results file."""

    method: str
    """One of `TITLES`."""
    seed: int
    """Of the order of the data, and of random weights."""
    steps: int
    """Optimizer steps."""
    batch: int
    """Samples of a step."""
    teacher_ce: float
    """Validation cross-entropy of the teacher on the right completions, in nats per token."""
    start_ce: float
    """Of the student before its training, measured by transformers alone."""
    end_ce: float
    """And after it, likewise."""
    exact_match: float
    """Greedy answers that are right, after it."""
    curve: dict[int, float]
    """Step -> validation cross-entropy, as the run itself measured it (`eval/cross_entropy`)."""
    tokens: int
    """Tokens trained on."""
    train_s: float
    """Time of the steps and the waits between them, start-up and evaluation apart."""
    flop_ratio: float
    """Of distillation to maximum likelihood for the same tokens, by the models' parameters."""
    choices: dict[str, float]
    """Task of `benchmarks.choices` -> share of its questions that the student gets right."""
    teacher_choices: dict[str, float]
    """Likewise of the teacher."""

    @property
    def recovered(self) -> float:
        """Share of what truncation cost in cross-entropy that the training won back."""
        return (self.start_ce - self.end_ce) / (self.start_ce - self.teacher_ce)

    @property
    def flops(self) -> float:
        """Of the run's own steps without generation, in units of one sample's maximum likelihood."""
        return self.steps * self.batch * (self.flop_ratio if self.method in ("kd", "then_gkd") else 1.0)


def finished() -> list[Run]:
    """What is in the results file."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    rows = [json.loads(line) for line in lines]
    return [Run(**row | {"curve": {int(at): ce for at, ce in row["curve"].items()}}) for row in rows]


def write_tables(runs: Sequence[Run], page: Path) -> None:
    """Put what was found between the marks of the page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(_BEGIN)
    after = rest.partition(_END)[2]
    text = "\n".join(_found(runs)) if runs else "No run is finished yet."
    page.write_text(f"{before}{_BEGIN}\n{text}\n{_END}{after}", encoding="utf-8")


def _found(runs: Sequence[Run]) -> list[str]:
    teacher, ratio = runs[0].teacher_ce, runs[0].flop_ratio
    unit = next((run.flops for run in runs if run.method == "first_k"), runs[0].flops)
    rows = [
        "| student | seeds | steps | FLOPs | CE before | CE after | recovered | exact match | seconds | tokens/s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for method, title in TITLES.items():
        own = [run for run in runs if run.method == method]
        if own:
            cells = [
                title,
                str(len(own)),
                f"{own[0].steps:,} x {own[0].batch}",
                f"{own[0].flops / unit:.2f}" if own[0].flop_ratio == ratio else "-",
                _spread(own, lambda run: run.start_ce),
                _spread(own, lambda run: run.end_ce, digits=4),
                f"{statistics.fmean(run.recovered for run in own):.1%}",
                _spread(own, lambda run: run.exact_match),
                f"{statistics.median(run.train_s for run in own):.0f}",
                f"{statistics.median(run.tokens / run.train_s for run in own):,.0f}",
            ]
            rows.append(f"| {' | '.join(cells)} |")
    return [
        f"Teacher: {teacher:.4f} nats per token. FLOPs are relative to the first row (-: other depths); vanilla",
        f"KD takes {ratio:.2f} times those of maximum likelihood for the same tokens (`gkd/compress/flops.py`). Mean",
        "and standard deviation over the seeds.",
        "",
        *rows,
        "",
        *_chosen(runs),
        *_relations(runs),
    ]


def _chosen(runs: Sequence[Run]) -> list[str]:
    """Shares of multiple-choice questions, and their mean over the tasks."""
    teacher = runs[0].teacher_choices
    lines = [
        "Multiple choice, four options, scored by their mean log-likelihood (`benchmarks/choices.py`); chance is .250.",
        "",
        f"| student | seeds | {' | '.join(teacher)} | all |",
        f"|---|---|{'---|' * len(teacher)}---|",
        f"| the teacher | - | {' | '.join(f'{share:.3f}' for share in teacher.values())} | {_mean(teacher):.3f} |",
    ]
    for method, title in TITLES.items():
        if own := [run for run in runs if run.method == method]:
            shares = [_spread(own, lambda run, name=name: run.choices[name]) for name in teacher]
            mean = _spread(own, lambda run: _mean(run.choices))
            lines.append(f"| {title} | {len(own)} | {' | '.join(shares)} | {mean} |")
    return [*lines, ""]


def _mean(choices: Mapping[str, float]) -> float:
    return statistics.fmean(choices.values())


def _spread(runs: Sequence[Run], of: Callable[[Run], float], *, digits: int = 3) -> str:
    values = [of(run) for run in runs]
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def _relations(runs: Sequence[Run]) -> list[str]:
    """What the paper expects, and what came out: paired differences, seed by seed."""
    by = {(run.method, run.seed): run for run in runs}
    seeds = sorted({run.seed for run in runs})

    def pairs(first: str, second: str) -> list[tuple[Run, Run]]:
        return [(by[first, s], by[second, s]) for s in seeds if (first, s) in by and (second, s) in by]

    found = []
    if random := pairs("first_k", "random"):
        below = all(a.curve[step] < b.curve[step] for a, b in random for step in a.curve)
        found += [_compared(random, "Truncated, against random weights at equal tokens", most=-0.1)]
        found += [f"- Its curve lies below that of random weights throughout: {_word([below])}."]
    if own := [run for run in runs if run.method == "first_k"]:
        shares = ", ".join(f"{run.recovered:.1%}" for run in own)
        found.append(
            f"- Of what truncation cost, {shares} is won back; at least 80 % expected: "
            f"{_word([run.recovered >= 0.8 for run in own])}."
        )
    for first, second, words, most in _EXPECTED:
        if compared := pairs(first, second):
            found.append(_compared(compared, words, most=most))
    for first, second, words in _ANSWERS:
        if compared := pairs(first, second):
            matches = ", ".join(f"{a.exact_match - b.exact_match:+.3f}" for a, b in compared)
            chosen = ", ".join(f"{_mean(a.choices) - _mean(b.choices):+.3f}" for a, b in compared)
            found.append(f"- {words}: {matches} in exact match; {chosen} in multiple choice.")
    return found


_EXPECTED = (
    ("first_k", "kd", "Teacher-free, against vanilla KD at equal tokens, where KD may win", None),
    ("equal_flops", "kd", "Teacher-free, against vanilla KD at equal FLOPs", 0.02),
    ("uniform", "last_k", "Evenly spaced layers, against the last", 0.0),
    ("both_ends", "last_k", "Layers of both ends, against the last", 0.0),
    ("spaced_from_first", "last_k", "Every other layer, against the last", 0.0),
    ("first_k", "both_ends", "The first layers, against both ends", None),
    ("equal_flops", "both_ends_longer", "The same after the longer training", None),
    ("spaced_from_first", "both_ends", "Every other layer, against both ends", None),
    ("spaced_longer", "both_ends_longer", "The same after the longer training", None),
    ("spaced_from_first_2", "both_ends_2", "The same with 2 layers", None),
    ("spaced_from_first_4", "both_ends_4", "The same with 4 layers", None),
    ("spaced_from_first_2", "first_k_2", "Every third layer, against the first 2", None),
    ("spaced_from_first_4", "first_k_4", "4 layers evenly from the first, against the first 4", None),
    ("scratch", "equal_flops", "From scratch with the whole budget, against the longer truncated run", 0.0),
)
"""Two methods, what is compared, and the most that the first one's cross-entropy may be above the second's, in nats;
None where nothing is expected (Jha et al. for the rest)."""

_ANSWERS = (
    ("first_k", "random", "Truncated, against random weights at equal tokens"),
    ("equal_flops", "kd", "Teacher-free, against vanilla KD at equal FLOPs"),
    ("first_k", "both_ends", "The first layers, against both ends"),
    ("equal_flops", "both_ends_longer", "The same after the longer training"),
    ("spaced_from_first", "both_ends", "Every other layer, against both ends"),
    ("spaced_longer", "both_ends_longer", "The same after the longer training"),
    ("then_gkd", "then_sft", "On-policy GKD of the truncated student, against training on without it"),
)
"""Two methods whose right answers are compared, and how that is put."""


def _compared(pairs: Sequence[tuple[Run, Run]], words: str, *, most: float | None) -> str:
    gaps = [first.end_ce - second.end_ce for first, second in pairs]
    values = ", ".join(f"{gap:+.4f}" for gap in gaps)
    expected = "" if most is None else f"; at most {most:+g} expected: {_word([gap <= most for gap in gaps])}"
    return f"- {words}: {values} nats{expected}."


def _word(holds: Sequence[bool]) -> str:
    return "**found**" if all(holds) else f"**not found** ({sum(holds)} of {len(holds)})"
