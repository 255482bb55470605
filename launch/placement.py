"""Which worker gets which resources, and whether they all fit, before anything starts."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gkd.config import Config
from gkd.errors import UserError


@dataclass(frozen=True, slots=True)
class Place:
    """One worker's share of the machine."""

    worker: str
    """`rollout`, `teacher`, `teacher_rollout` (a teacher that writes), `trainer` or `reward`; of several teachers with
    the teacher's name after it."""
    num_cpus: float
    """CPU share that Ray books for it."""
    num_gpus: float
    """GPUs that Ray books for it."""
    at_once: int = 1
    """On a host without GPUs: into how many parts its cores are divided, as so many sides are busy at the same time; 1
    where all workers take turns."""

    @property
    def kind(self) -> str:
        """`worker` without a name: those of one kind work at the same time."""
        return self.worker.split(" ")[0]


def available_cpus() -> int:
    """CPUs that this process may use: its affinity, and a container's quota."""
    allowed = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):  # no cgroup of version 2: no quota to be read
        return allowed
    return allowed if quota == "max" else max(1, min(allowed, round(int(quota) / int(period))))


def needed_places(config: Config) -> list[Place]:
    """What every worker of the run takes where there are GPUs, whatever this host has."""
    workers = ["trainer"] * config.trainer.num_ranks
    if config.needs_engine:
        workers += ["rollout"] * config.rollout.num_actors
    gpus = {"rollout": config.rollout.tensor_parallel_size, "reward": 0}
    if config.needs_teacher_workers:
        for name, teacher in zip(teacher_workers(config), config.all_teachers, strict=True):
            workers += [name] * teacher.num_actors
            gpus[name] = teacher.tensor_parallel_size if teacher.on_vllm else 1
    if config.teacher_writes:
        [teacher] = config.all_teachers
        workers += ["teacher_rollout"] * teacher.num_actors
        gpus["teacher_rollout"] = teacher.tensor_parallel_size
    if config.reward is not None:
        workers.append("reward")
    return [Place(worker, 1, gpus.get(worker, 1)) for worker in workers]


def teacher_workers(config: Config) -> list[str]:
    """What the workers of each teacher are called."""
    names = [teacher.name for teacher in config.all_teachers]
    return ["teacher"] if len(names) == 1 else [f"teacher {name}" for name in names]


def plan_placement(config: Config, num_cpus: float, num_gpus: float) -> list[Place]:
    """A place for every worker of the run.

    On hosts without GPUs the workers take turns (while the trainer waits for rollouts it needs no core), so each books
    a fraction of the CPUs; where there are GPUs every worker gets its own. In streaming the trainer works beside those
    who make its next batch, and threads that wait for each other on cores that others hold lose more than half of their
    time: there each side has half of the cores.

    Raises:
        UserError: if the workers do not fit.
    """
    places = fit_places(needed_places(config), num_cpus, num_gpus)
    has_two_sides = any(place.worker != "trainer" for place in places) and config.sync.max_staleness > 0
    return [replace(place, at_once=2 if has_two_sides else 1) for place in places]


def fit_places(places: Sequence[Place], num_cpus: float, num_gpus: float) -> list[Place]:
    """The places of workers, as `plan_placement` has them for those of a run.

    Raises:
        UserError: if the workers do not fit.
    """
    workers = [place.worker for place in places]
    if num_gpus == 0:
        share = min(1.0, int(100 * num_cpus / len(workers)) / 100)
        if share == 0:
            raise UserError("resources", f"{num_cpus} CPUs", "are too few for a worker.", "Free some CPUs.")
        return [Place(worker, share, 0) for worker in workers]
    needed = sum(place.num_gpus for place in places)
    if needed > num_gpus:
        raise UserError(
            "resources",
            f"{num_gpus:g} GPUs",
            f"are too few: {', '.join(workers)} need {needed:g}.",
            "Lower the numbers of actors and ranks, or hide the GPUs (CUDA_VISIBLE_DEVICES='') to run on CPUs.",
        )
    if len(workers) > num_cpus:
        raise UserError(
            "resources", f"{num_cpus:g} CPUs", f"are too few for {len(workers)} workers.", "Use a host with more cores."
        )
    return list(places)
