"""A run of `gkd train` on a case: `python -m benchmarks.speed.ours FOLDER STALENESS OUTPUT`."""

import json
import os
import shutil
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import ray
from rich.console import Console

from benchmarks.speed.cases import READY, Case, lengths_by_prompt, new_tokens_per_step, read_case
from gkd.trace import Lane, TracedWorker
from gkd.types import Prompt
from launch.placement import Place
from launch.ray_session import Workers, ray_session
from rollout.rollout_actor import RolloutActor
from rollout.vllm_generator import GeneratorSettings, VllmGenerator

_TIMES = ("step", "rollout", "teacher", "train", "train_wait", "rollout_wait", "teacher_wait")


@dataclass(frozen=True, slots=True, kw_only=True)
class _SettledLengths:
    engine: GeneratorSettings
    lengths: Mapping[tuple[int, ...], int]


class _Generator(VllmGenerator):
    """Ends each response where the case says."""

    def __init__(self, settings: _SettledLengths) -> None:
        super().__init__(settings.engine)
        self._lengths = settings.lengths

    def _add_request(self, name: str, prompt: Prompt, params: Any, *, salt: str, priority: int = 0) -> None:
        if salt == "rollout":  # probes have prompts of the data, too, and lengths of their own
            params.max_tokens, params.stop_token_ids = self._lengths[prompt.token_ids], []
        super()._add_request(name, prompt, params, salt=salt, priority=priority)


@ray.remote
class _SettledActor(RolloutActor.__ray_metadata__.modified_class):  # type: ignore[misc]
    def __init__(self, settings: _SettledLengths) -> None:
        TracedWorker.__init__(self, Lane())  # in the place of the actor's own start
        self._generator = _Generator(settings)


WORKERS = {"trainer": "ray::TrainerActor", "rollout": "ray::_SettledActor", "teacher": "ray::TeacherActor"}
"""Kind of worker -> what its process is called."""


class SettledWorkers(Workers):
    """The workers of a run, whose engine knows how long each response is."""

    def __init__(self, places: list[Place], lengths: Mapping[tuple[int, ...], int]) -> None:
        super().__init__(places)
        self._lengths = lengths

    def start(self, worker: str, actor_class: Any, settings: Any) -> Any:
        """Start an actor."""
        if worker == "rollout":
            return super().start(worker, _SettledActor, _SettledLengths(engine=settings, lengths=self._lengths))
        return super().start(worker, actor_class, settings)

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until every actor is up, and say so."""
        super().wait_ready(timeout_s)
        print(READY, flush=True)


def config_tree(case: Case, *, max_staleness: int) -> dict[str, Any]:
    """The run's config."""
    return {
        "run": {"name": case.name, "output_dir": str(case.folder / "gkd"), "resume": "never"},
        "student": {"model": str(case.folder / "student")},
        "teacher": {"model": str(case.folder / "teacher"), "num_actors": case.teacher_actors},
        "data": {"train": {"path": str(case.folder / "prompts.jsonl")}},
        "rollout": {"max_new_tokens": case.new_tokens[1], "num_actors": case.rollout_actors},
        "objective": {"type": "distill", "divergence": {"type": "generalized_jsd", "beta": 0.5}},
        "trainer": {
            "max_steps": case.run_steps,
            "batch_size": case.batch,
            "num_ranks": case.ranks,
            "learning_rate": 1e-4,
            "checkpoint_every": 0,
        },
        "sync": {"max_staleness": max_staleness},
    }


def measure(case: Case, *, max_staleness: int) -> dict[str, Any]:
    """Medians over the steps that count, in seconds, and the seconds of each of these (`step_seconds`)."""
    from gkd.config import parse_config
    from launch.train import run_training

    shutil.rmtree(case.folder / "gkd", ignore_errors=True)
    open_workers = partial(SettledWorkers, lengths=lengths_by_prompt(case))
    with ray_session():
        run_training(parse_config(config_tree(case, max_staleness=max_staleness)), Console(), open_workers=open_workers)
    lines = [json.loads(line) for line in (case.folder / "gkd" / "metrics.jsonl").read_text().splitlines()]
    expected = new_tokens_per_step(case)
    assert all(line["tokens/generated"] == expected for line in lines), "lengths and order are settled"
    counted = lines[case.warm_up :][: case.steps]
    found = {f"{name}_s": statistics.median(line[f"time/{name}_s"] for line in counted) for name in _TIMES}
    found["sync_s"] = statistics.median(line["sync/seconds"] for line in counted)
    return found | {"tokens": float(expected), "step_seconds": [line["time/step_s"] for line in counted]}


def main() -> None:
    """Measure a case and write what came out."""
    folder, staleness, output = sys.argv[1:]
    found = measure(read_case(Path(folder)), max_staleness=int(staleness))
    Path(output).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
