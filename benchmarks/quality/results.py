"""The committed file of finished runs: one JSON object a line, appended as each run ends."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

RESULTS = Path("benchmarks/results/quality.jsonl")
SERIES_EVERY = 10
"""Steps between the values of a series."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run of the comparison."""

    setting: str
    """A key of `SETTINGS`: the task, and what the student has to learn from."""
    teacher: int
    """Seed of the teacher."""
    seed: int
    """Of the student: its examples, its first weights, its data order."""
    method: str
    """A key of `METHODS`."""
    steps: int
    """Optimizer steps from the warm start."""
    learning_rate: float
    """Peak."""
    split: Literal["validation", "test"]
    """Held-out problems that it is measured on; learning rates are chosen on the first."""

    @property
    def name(self) -> str:
        """Of its folder and in messages."""
        return (
            f"{self.setting}-t{self.teacher}-s{self.seed}-{self.method}-{self.steps}-"
            f"{self.learning_rate:g}-{self.split}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a run came to."""

    cell: Cell
    """The run."""
    warm: str
    """Hash of the weights that it began with: differences are taken between runs of one start alone."""
    teacher: str
    """Likewise of the teacher's."""
    before: dict[str, Any]
    """The warm start, measured alike."""
    after: dict[str, Any]
    """`benchmarks.quality.measure.measure`."""
    metrics: dict[str, float]
    """Of the run: `tokens`, `step_s` (median), `train_s` (sum over the steps)."""
    curve: list[tuple[float, float]] = field(default_factory=list)
    """Exact match over the tokens trained on, from checkpoints; of some students alone."""
    series: dict[str, list[float]] = field(default_factory=dict)
    """What moment matching logged of its distances, from step 1 on; of some students alone."""


def read_results(path: Path = RESULTS) -> list[Result]:
    """Every finished run, in the order in which they ended."""
    if not path.exists():
        return []
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [Result(**(line | {"cell": Cell(**line["cell"])})) for line in lines]


def append(result: Result, path: Path = RESULTS) -> None:
    """Add a finished run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(_rounded(asdict(result))) + "\n")


def _rounded(value: Any) -> Any:
    """Five digits: more would be noise, and the file is read by people too."""
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
