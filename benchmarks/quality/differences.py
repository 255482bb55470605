"""Differences between methods, taken within students: runs of one warm start under one teacher."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.quality.methods import OTHERS
from benchmarks.quality.plan import STEPS, TIMED
from benchmarks.quality.results import Result
from benchmarks.quality.task import SETTINGS

WARM = "warm"
"""In the place of a second method: the warm start itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A difference that is taken, the first method minus the second."""

    first: str
    """A method."""
    second: str
    """Another, or `WARM`."""
    metric: str = "exact_match"
    """What is compared, a key of what `measure` returns."""
    expected: Literal["below", "above"] | None = None
    """Which side of 0 the method's paper has the difference on; None where it is only reported."""
    claim: str = ""
    """What is then so, or what it says."""


ACCURACY = (
    Comparison(first="gkd_reverse_kl", second="kd_reverse_kl"),
    Comparison(first="gkd_jsd_0.5", second="kd_jsd_0.5"),
    Comparison(first="gkd_forward_kl", second="kd"),
    Comparison(first="gkd_reverse_kl", second="kd"),
    Comparison(first="gkd_jsd_0.5", second="kd"),
    Comparison(first="kd", second="sft"),
    Comparison(first="seq_kd", second="sft"),
    Comparison(first="seq_kd", second="kd"),
    Comparison(first="gkd_jsd_0.5", second="seq_kd"),
    Comparison(first="gkd_reverse_kl", second="sft"),
    Comparison(first="gkd_jsd_0.5", second="sft"),
)
"""Of exact match."""
OF_OTHERS = tuple(Comparison(first=method, second=second) for second in ("sft", "kd") for method in OTHERS)
"""Of exact match, of the methods that fewer students were trained with."""
IN_EQUAL_TIME = (
    Comparison(first="gkd_jsd_0.5", second="sft"),
    Comparison(first="gkd_reverse_kl", second="sft"),
    Comparison(first="gkd_jsd_0.5", second="kd"),
    Comparison(first="gkd_reverse_kl", second="kd"),
    Comparison(first="gkd_jsd_0.5", second="seq_kd"),
)
"""Of exact match, where the second method of each has the steps that fit the first one's time."""

_NEARER = "on-policy text brings the student nearer to its teacher where it walks itself"
_MENDED = "what to do after a mistake of one's own is learnt from text that has such mistakes"
_GIVEN = "on given text, who learns from given text is at least as near to its teacher"
_SEEKING = "the student spreads less"
_TRADED = "less weight on the teacher: more reward"
_PAID = "less weight on the teacher: farther from it"
_LEARNT = "the distance is below that of the warm start"
_CLOSE = "both sides at once: how far from the better of each"
_OWN_SIDE = "the lower distance on the side that was trained on"

RELATIONS = (
    Comparison(first="gkd_forward_kl", second="kd", metric="forward_kl", expected="below", claim=_NEARER),
    Comparison(first="gkd_jsd_0.5", second="kd_jsd_0.5", metric="reverse_kl", expected="below", claim=_NEARER),
    Comparison(first="gkd_reverse_kl", second="kd_reverse_kl", metric="reverse_kl", expected="below", claim=_NEARER),
    Comparison(first="gkd_forward_kl", second="kd", metric="sampled_recovered", expected="above", claim=_MENDED),
    Comparison(first="gkd_jsd_0.5", second="kd_jsd_0.5", metric="sampled_recovered", expected="above", claim=_MENDED),
    Comparison(
        first="gkd_reverse_kl", second="kd_reverse_kl", metric="sampled_recovered", expected="above", claim=_MENDED
    ),
    Comparison(first="gkd_forward_kl", second="kd", metric="dataset_forward_kl", expected="above", claim=_GIVEN),
    Comparison(first="gkd_jsd_0.5", second="kd_jsd_0.5", metric="dataset_forward_kl", expected="above", claim=_GIVEN),
    Comparison(
        first="gkd_reverse_kl", second="kd_reverse_kl", metric="dataset_reverse_kl", expected="above", claim=_GIVEN
    ),
    Comparison(first="gkd_reverse_kl", second="gkd_forward_kl", metric="entropy", expected="below", claim=_SEEKING),
    Comparison(first="gkd_jsd_0.9", second="gkd_jsd_0.1", metric="entropy", expected="below", claim=_SEEKING),
    *(
        Comparison(first=f"rl_gkd_{low}", second=f"rl_gkd_{high}", metric=metric, expected="above", claim=claim)
        for low, high in (("0.5", "0.75"), ("0.25", "0.5"), ("0.05", "0.25"))
        for metric, claim in (("sampled_exact_match", _TRADED), ("reverse_kl", _PAID))
    ),
    Comparison(first="amm_both", second=WARM, metric="d_on", expected="below", claim=_LEARNT),
    Comparison(first="amm_both", second=WARM, metric="d_off_teacher", expected="below", claim=_LEARNT),
    Comparison(first="amm_on", second="amm_off", metric="d_on", expected="below", claim=_OWN_SIDE),
    Comparison(first="amm_off", second="amm_on", metric="d_off_teacher", expected="below", claim=_OWN_SIDE),
    Comparison(first="amm_both", second="amm_on", metric="d_on", claim=_CLOSE),
    Comparison(first="amm_both", second="amm_off", metric="d_off_teacher", claim=_CLOSE),
    Comparison(
        first="amm_both",
        second="kd",
        metric="total_variation",
        expected="below",
        claim="moment matching ends no farther from the teacher than KD does",
    ),
)
"""What small runs of the methods have to show."""

_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""97.5 % points of Student's t with 1, 2, ... degrees of freedom."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What came out of a comparison."""

    setting: str
    """A key of `SETTINGS`."""
    first: str
    """As of the comparison."""
    second: str
    """As of the comparison."""
    metric: str
    """As of the comparison."""
    expected: str | None
    """As of the comparison."""
    claim: str
    """As of the comparison."""
    mean: float
    """Over the students."""
    interval: tuple[float, float] | None
    """95 % by Student's t over the students; None of one student."""
    positive: int
    """Students whose difference is above 0."""
    negative: int
    """Students whose difference is below 0."""
    students: int
    """Warm starts that both began with."""


def differences(runs: Sequence[Result], comparisons: Sequence[Comparison]) -> list[Difference]:
    """Of every comparison that has students in these runs. One of several teachers counts once, by its mean."""
    found = []
    for setting in SETTINGS:
        for comparison in comparisons:
            first = _by_start(runs, setting, comparison.first, comparison.metric)
            if comparison.second == WARM:
                second = _by_start(runs, setting, comparison.first, comparison.metric, warm=True)
            else:
                second = _by_start(runs, setting, comparison.second, comparison.metric)
            of_student: dict[str, list[float]] = {}
            for warm, teacher in sorted(first.keys() & second.keys()):
                of_student.setdefault(warm, []).append(first[warm, teacher] - second[warm, teacher])
            if of_student:
                found.append(_difference(setting, comparison, [statistics.fmean(own) for own in of_student.values()]))
    return found


def equal_steps(results: Sequence[Result]) -> list[Result]:
    """Test runs of as many steps as all methods have."""
    return [result for result in results if result.cell.split == "test" and result.cell.steps == STEPS]


def equal_time(results: Sequence[Result]) -> list[Result]:
    """Test runs that take as long as on-policy ones: with more steps where a step is shorter."""
    return [
        result
        for result in results
        if result.cell.split == "test" and (result.cell.steps != STEPS) == (result.cell.method in TIMED)
    ]


def _by_start(
    runs: Sequence[Result], setting: str, method: str, metric: str, *, warm: bool = False
) -> dict[tuple[str, str], float]:
    """(weights of the warm start, of the teacher) -> the metric, after the run or of the warm start."""
    return {
        (result.warm, result.teacher): (result.before if warm else result.after)[metric]
        for result in runs
        if (result.cell.setting, result.cell.method) == (setting, method) and metric in result.after
    }


def _difference(setting: str, comparison: Comparison, values: Sequence[float]) -> Difference:
    mean, interval = statistics.fmean(values), None
    if len(values) > 1:
        reach = _T_975[min(len(values) - 1, len(_T_975)) - 1] * statistics.stdev(values) / len(values) ** 0.5
        interval = (mean - reach, mean + reach)
    return Difference(
        setting=setting,
        first=comparison.first,
        second=comparison.second,
        metric=comparison.metric,
        expected=comparison.expected,
        claim=comparison.claim,
        mean=mean,
        interval=interval,
        positive=sum(value > 0 for value in values),
        negative=sum(value < 0 for value in values),
        students=len(values),
    )
