"""The plan of a run beside what the run took: seconds, bytes and memory."""

import json
import os
import threading
from pathlib import Path
from statistics import fmean

import pytest
from typer.testing import CliRunner

from gkd.config import load_config
from launch.cli import app
from launch.plan import make_plan
from launch.plan_request import PlanRequest

WORKERS = {"ray::TrainerActor": "trainer", "ray::RolloutActor": "rollout", "ray::TeacherActor": "teacher"}


class PeakMemory:
    """Watches the workers' memory while a run goes on: bytes of each one, pages that several share divided by them."""

    def __enter__(self):
        self.peak, self._stop = {}, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _watch(self):
        while not self._stop.wait(0.5):
            for folder in Path("/proc").glob("[0-9]*"):
                try:
                    name = (folder / "cmdline").read_bytes().split(b"\0")[0].decode()
                    worker = next((w for title, w in WORKERS.items() if name.startswith(title)), None)
                    if worker is None or os.getuid() != folder.stat().st_uid:
                        continue
                    rollup = (folder / "smaps_rollup").read_text()
                except (OSError, UnicodeDecodeError):  # it ended meanwhile
                    continue
                shared_out = 1024 * int(
                    next(line for line in rollup.splitlines() if line.startswith("Pss:")).split()[1]
                )
                self.peak[worker] = max(self.peak.get(worker, 0), shared_out)


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
    }
    with PeakMemory() as memory:
        metrics, _, folder = train("run", changes)
    config = load_config(folder / "config.yaml")
    plan = make_plan(config, PlanRequest(run=folder, on_cpu=True))
    print(plan.timings, plan.measured_step_s, memory.peak, plan.needs, plan.advice)

    assert plan.timings["config"].step_s == pytest.approx(plan.measured_step_s, rel=0.25)
    assert plan.wires["weights to each engine"] == pytest.approx(metrics[-1]["sync/bytes"], rel=0.05)
    [signals] = [size for wire, size in plan.wires.items() if wire.startswith("signals")]
    assert signals == pytest.approx(fmean(line["teacher/signal_bytes"] for line in metrics), rel=0.25)
    for need in plan.needs:
        if need.worker in memory.peak:
            assert need.num_bytes == pytest.approx(memory.peak[need.worker], rel=0.25), need.worker

    shown = CliRunner().invoke(app, ["plan", str(folder / "config.yaml"), "--run", str(folder), "--cpu", "--json"])
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["measured_step_s"] == plan.measured_step_s
