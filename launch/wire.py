"""Which wire carries the weights of a run."""

from collections.abc import Sequence

from gkd.config import Config
from launch.placement import Place
from rollout.weights.choice import Wire, choose_wire


def wire_between(config: Config, places: Sequence[Place]) -> Wire:
    """The wire that carries the weights, from where the workers sit.

    Raises:
        UserError: if the wire that the config asks for cannot connect them.
    """
    gpus = [[f"{index}/{number}" for number in range(int(place.num_gpus))] for index, place in enumerate(places)]
    engines = [own for own, place in zip(gpus, places, strict=True) if place.worker == "rollout"]
    if not engines:
        return "object_store"  # nothing travels
    senders = [own for own, place in zip(gpus, places, strict=True) if place.worker == "trainer"]
    sender = senders[0][0] if senders[0] else None
    return choose_wire(config.sync.backend, sender=sender, engines=engines, adapter=config.student.lora is not None)
