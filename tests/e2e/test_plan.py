"""The plan of a run beside what the run took: seconds, bytes and memory."""

import contextlib
import json
import threading
from statistics import fmean

import psutil
import pytest
from typer.testing import CliRunner

from gkd.config import load_config
from launch.cli import app
from launch.planning.plan import make_plan
from launch.planning.request import PlanRequest

WORKERS = {"trainer": "ray::TrainerActor", "rollout": "ray::RolloutActor", "teacher": "ray::TeacherActor"}


class PeakMemory:
    """Watches this process's workers while a run goes on: the largest resident set of each, in bytes."""

    def __enter__(self):
        self.peak, self._stop = {}, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _watch(self):
        while not self._stop.wait(1.0):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker = next((w for w in WORKERS.values() if " ".join(process.cmdline()).startswith(w)), None)
                    if worker is not None:
                        self.peak[worker] = max(self.peak.get(worker, 0), process.memory_info().rss)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("max_staleness", [0, 1])
def test_the_plan_of_a_run_is_what_it_took(train, max_staleness):
    changes = {
        "trainer.max_steps": 16,
        "trainer.batch_size": 16,
        "trainer.checkpoint_every": 0,
        "rollout.max_new_tokens": 64,
        "rollout.timeout_s": 900,
        "sync.max_staleness": max_staleness,
        "sync.bucket_mib": 1,  # two such buckets are counted, and the tiny model does not fill them
    }
    with PeakMemory() as memory:
        metrics, _, folder = train("run", changes)
    config = load_config(folder / "config.yaml")
    plan = make_plan(config, PlanRequest(run=folder, on_cpu=True))
    print(plan.timings, plan.measured_step_s, memory.peak, plan.advice)

    assert plan.timings["config"].step_s == pytest.approx(plan.measured_step_s, rel=0.25)
    assert plan.wires["weights to each engine"] == pytest.approx(metrics[-1]["sync/bytes"], rel=0.05)
    [signals] = [size for wire, size in plan.wires.items() if wire.startswith("signals")]
    assert signals == pytest.approx(fmean(line["teacher/signal_bytes"] for line in metrics), rel=0.25)
    needed = {need.worker: need.num_bytes for need in plan.needs}
    for worker, process in WORKERS.items():
        assert needed[worker] == pytest.approx(memory.peak[process], rel=0.25)

    shown = CliRunner().invoke(app, ["plan", str(folder / "config.yaml"), "--run", str(folder), "--cpu", "--json"])
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["measured_step_s"] == plan.measured_step_s
