"""Which runs the comparison consists of, and which of them is next.

What comes first is what most hangs on: the learning rates of the headline methods, then those methods over all seeds.
"""

import statistics
from collections.abc import Collection, Iterator, Sequence

from benchmarks.quality.methods import CONTROLS, HEADLINE, OTHERS
from benchmarks.quality.results import Cell, Result

STEPS = 100
"""Optimizer steps of every method, of 32 samples each. After 250 maximum likelihood alone reached .968."""
RATES = (3e-4, 6e-4, 1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2)
"""Learning rates that may be tried: from the middle on, until the best one has worse neighbours."""
_FIRST_RATES = RATES[3:5]
SEEDS = tuple(range(8))
FEW_SEEDS = SEEDS[:3]
TUNING_SEEDS = (100, 101)
SEEKING = ("gkd_jsd_0.1", "gkd_jsd_0.9")
"""Beside the two KL, the methods that say whether a student too small for its teacher spreads or seeks modes."""
TUNED_AS = {f"rl_gkd_{alpha}": "rl_gkd_0.5" for alpha in ("0.75", "0.25", "0.05")}
"""Methods that take the learning rate of another, from which they differ in a weight alone."""
TIMED = ("sft", "kd", "seq_kd")
"""Methods that also get as many steps as fit the time of on-policy distillation."""
_REFERENCE = "gkd_jsd_0.5"


def next_cell(results: Sequence[Result], methods: Collection[str]) -> Cell | None:
    """The first run of the plan that is not done; None once all are.

    Args:
        results: finished runs.
        methods: those that are compared; runs of others are left out.
    """
    done = {result.cell for result in results}
    planned = (cell for cell in _plan(results) if cell.method in methods)
    return next((cell for cell in planned if cell not in done), None)


def _plan(results: Sequence[Result]) -> Iterator[Cell]:
    """Every run, in order. Later ones hang on what earlier ones found, so this is asked anew after each."""
    yield from _tuning(results, HEADLINE)
    yield from _compared(results, HEADLINE, "clean", 0, SEEDS)
    yield from _tuning(results, CONTROLS)
    yield from _compared(results, CONTROLS, "clean", 0, FEW_SEEDS)
    yield from _compared(results, (*HEADLINE, *CONTROLS), "sorting", 0, FEW_SEEDS)
    yield from _compared(results, HEADLINE, "clean", 1, SEEDS)
    yield from _tuning(results, [method for method in OTHERS if method not in TUNED_AS])
    yield from _compared(results, OTHERS, "clean", 0, FEW_SEEDS)
    yield from _timed(results)
    yield from _compared(results, (*HEADLINE, *CONTROLS, *SEEKING), "small", 0, FEW_SEEDS)
    yield from _compared(results, HEADLINE, "noisy", 0, FEW_SEEDS)


def _tuning(results: Sequence[Result], methods: Collection[str]) -> Iterator[Cell]:
    for method in methods:
        rate = next_rate(results, method)
        for seed in _tuning_seeds(method) if rate is not None else ():
            yield Cell(
                setting="clean",
                teacher=0,
                seed=seed,
                method=method,
                steps=STEPS,
                learning_rate=rate,
                split="validation",
            )


def _tuning_seeds(method: str) -> Sequence[int]:
    return TUNING_SEEDS if method in HEADLINE else TUNING_SEEDS[:1]


def _compared(
    results: Sequence[Result], methods: Collection[str], setting: str, teacher: int, seeds: Sequence[int]
) -> Iterator[Cell]:
    """One student after the other, so that all methods of one begin with the same weights and engines."""
    rates = {method: chosen_rate(results, method) for method in methods}
    for seed in seeds:
        for method, rate in rates.items():
            if rate is not None:
                yield _test_cell(setting, teacher, seed, method, STEPS, rate)


def _timed(results: Sequence[Result]) -> Iterator[Cell]:
    """Off-policy methods with the steps that fit the time of as many on-policy ones."""
    for method in TIMED:
        rate, ratio = chosen_rate(results, method), time_ratio(results, method)
        if rate is not None and ratio is not None:
            for seed in SEEDS:
                yield _test_cell("clean", 0, seed, method, round(STEPS * ratio / 10) * 10, rate)


def _test_cell(setting: str, teacher: int, seed: int, method: str, steps: int, rate: float) -> Cell:
    return Cell(
        setting=setting, teacher=teacher, seed=seed, method=method, steps=steps, learning_rate=rate, split="test"
    )


def next_rate(results: Sequence[Result], method: str) -> float | None:
    """The learning rate to be tried next; None once the best one's neighbours are worse, or there are no more."""
    found = _accuracies(results, method)
    best = max(found, key=lambda rate: statistics.fmean(found[rate])) if found else _FIRST_RATES[0]
    place = RATES.index(best)
    wanted = (*_FIRST_RATES, *RATES[max(0, place - 1) : place + 2])
    return next((rate for rate in wanted if len(found.get(rate, ())) < len(_tuning_seeds(method))), None)


def chosen_rate(results: Sequence[Result], method: str) -> float | None:
    """The learning rate with the highest mean exact match on the validation problems; None before it is sure."""
    method = TUNED_AS.get(method, method)
    found = _accuracies(results, method)
    return None if next_rate(results, method) else max(found, key=lambda rate: statistics.fmean(found[rate]))


def _accuracies(results: Sequence[Result], method: str) -> dict[float, list[float]]:
    """Learning rate -> exact match on the validation problems, of every student that tried it."""
    found: dict[float, list[float]] = {}
    for result in results:
        if result.cell.method == method and result.cell.split == "validation":
            found.setdefault(result.cell.learning_rate, []).append(result.after["exact_match"])
    return found


def time_ratio(results: Sequence[Result], method: str) -> float | None:
    """Time of an on-policy step over a step of `method`, medians over the students that ran both."""
    own, reference = _step_seconds(results, method), _step_seconds(results, _REFERENCE)
    both = own.keys() & reference.keys()
    if len(both) < len(SEEDS):
        return None
    return statistics.median(reference[seed] / own[seed] for seed in both)


def _step_seconds(results: Sequence[Result], method: str) -> dict[int, float]:
    """Of each student, with clean labels and the first teacher, at equal steps."""
    return {
        result.cell.seed: result.metrics["step_s"]
        for result in results
        if (result.cell.method, result.cell.setting, result.cell.teacher) == (method, "clean", 0)
        and (result.cell.split, result.cell.steps) == ("test", STEPS)
    }
