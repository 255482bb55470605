"""Ray: started in-process, or joined where an address is given."""

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from gkd.errors import UserError
from launch.placement import Place, available_cpus


@contextmanager
def ray_session() -> Iterator[None]:
    """Have a Ray to work with: the running one, the cluster of RAY_ADDRESS, or one started here and stopped after."""
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    size = {} if address else {"num_cpus": available_cpus()}
    try:
        if address:
            _knock(address)
        ray.init(address=address, include_dashboard=False, log_to_driver=False, configure_logging=False, **size)
    except (ConnectionError, OSError) as error:
        if not address:
            raise
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(
            "RAY_ADDRESS", address, f"no Ray cluster answers there: {reason}.", "Correct it, or unset it to run here."
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Fail at once where nothing listens: `ray.init` would go on trying for minutes."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if separator and port.isdigit():
        socket.create_connection((host, int(port)), timeout=5).close()


def joins_cluster() -> bool:
    """Whether runs join a cluster, so that this host's size says nothing."""
    return bool(os.environ.get("RAY_ADDRESS"))


def resources() -> tuple[float, float]:
    """CPUs and GPUs of the Ray that runs, else of this host."""
    if ray.is_initialized():
        total = ray.cluster_resources()
        return total.get("CPU", 0.0), total.get("GPU", 0.0)
    import torch

    return float(available_cpus()), float(torch.cuda.device_count())


class Workers:
    """Actors in one placement group; closing it ends them and frees their places."""

    def __init__(self, places: list[Place]) -> None:
        """Reserve all places at once, so that a run starts whole or not at all.

        Raises:
            UserError: if the cluster cannot give them.
        """
        from ray.util.placement_group import placement_group, remove_placement_group

        self._places = places
        self._free = list(range(len(places)))
        self._actors: list[Any] = []
        bundles = [{"CPU": place.num_cpus} | ({"GPU": place.num_gpus} if place.num_gpus else {}) for place in places]
        self._group = placement_group(bundles, strategy="PACK")
        if not self._group.wait(timeout_seconds=60):
            free = ray.available_resources()
            remove_placement_group(self._group)
            raise UserError(
                "resources",
                f"{free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs free",
                f"cannot hold the workers {', '.join(place.worker for place in places)}.",
                "Stop what else runs on this Ray cluster, or lower the numbers of actors and ranks.",
            )

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        from ray.util.placement_group import remove_placement_group

        for actor in self._actors:
            ray.kill(actor)
        remove_placement_group(self._group)

    def start(self, worker: str, actor_class: Any, settings: Any) -> Any:
        """Start an actor on the next free place of `worker`; returns at once, before the actor is up."""
        index = next(i for i in self._free if self._places[i].worker == worker)
        return self._start(index, actor_class, settings, {})

    def start_all(self, worker: str, actor_class: Any, settings: Any) -> list[Any]:
        """Start an actor on every place of `worker`."""
        return [self.start(worker, actor_class, settings) for place in self._places if place.worker == worker]

    def start_ranks(self, actor_class: Any, settings: Any) -> list[Any]:
        """Start the training ranks, rank 0 first, each told how to find the others."""
        indices = [i for i in self._free if self._places[i].worker == "trainer"]
        host, port = ray.get(self._on_place(ray.remote(_free_address), indices[0], num_cpus=0).remote())
        return [
            self._start(index, actor_class, settings, _rank_environment(rank, len(indices), host, port, place))
            for rank, index in enumerate(indices)
            for place in [self._places[index]]
        ]

    def _start(self, index: int, actor_class: Any, settings: Any, env: dict[str, str]) -> Any:
        self._free.remove(index)
        place = self._places[index]
        env = _environment(place, threads_of(place, self._places)) | env
        options = {"num_cpus": place.num_cpus, "num_gpus": place.num_gpus, "runtime_env": {"env_vars": env}}
        actor = self._on_place(actor_class, index, **options).remote(settings)
        self._actors.append(actor)
        return actor

    def _on_place(self, task: Any, index: int, **options: Any) -> Any:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
        return task.options(scheduling_strategy=strategy, **options)

    @property
    def places(self) -> list[Place]:
        """Where the workers sit."""
        return self._places

    @property
    def on_gpus(self) -> bool:
        """Whether workers run on GPUs."""
        return any(place.num_gpus for place in self._places)

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until every actor is up; an error in an actor's start is raised here.

        Raises:
            TimeoutError: if one is not up in time.
        """
        try:
            ray.get([actor.ready.remote() for actor in self._actors], timeout=timeout_s)
        except ray.exceptions.GetTimeoutError:
            names = ", ".join(place.worker for place in self._places)
            raise TimeoutError(
                f"the workers ({names}) were not up within {timeout_s:g} s (rollout.timeout_s sets this limit)"
            ) from None


def threads_of(place: Place, places: Sequence[Place]) -> int:
    """Threads of a worker on a host without GPUs.

    Ray would give a worker with a fraction of a CPU one thread. Workers of different kinds take turns, unless their
    places say otherwise, so each may use every core; workers of one kind work at the same time and share them.
    """
    sharing = place.at_once * sum(other.kind == place.kind for other in places)
    return max(1, available_cpus() // sharing)


def _environment(place: Place, threads: int) -> dict[str, str]:
    """Environment of a worker."""
    passed_on = {
        name: value for name, value in os.environ.items() if name.startswith(("HF_", "VLLM_", "TRANSFORMERS_"))
    }
    # Plug-ins are found where the driver finds them, also by workers of a cluster that was started elsewhere.
    paths = [os.environ.get("PYTHONPATH", ""), str(Path.cwd())]
    passed_on["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    on_cpus = {} if place.num_gpus else _cpu_threads(threads)
    return {"VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"} | passed_on | on_cpus


def _cpu_threads(threads: int) -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": str(threads),
        # How long an idle OpenMP thread spins before it sleeps. At libgomp's default idle threads of one worker
        # take the cores from the worker whose turn it is; at 0 the engine's many short operations wait for
        # wake-ups. Measured on 2 cores; docs/PERFORMANCE.md has the numbers.
        "GOMP_SPINCOUNT": "20000",
        "DS_ACCELERATOR": "cpu",
    }


def _rank_environment(rank: int, num_ranks: int, host: str, port: int, place: Place) -> dict[str, str]:
    """What torch.distributed needs to know in a training rank."""
    return {
        "RANK": str(rank),
        # Ray shows a worker its own GPU alone, as number 0.
        "LOCAL_RANK": "0" if place.num_gpus else str(rank),
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
    }


def _free_address() -> tuple[str, int]:
    """Address of the node that this runs on, and a port that is free there."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return ray.util.get_node_ip_address(), probe.getsockname()[1]
