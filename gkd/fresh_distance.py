"""How far a student is from its teacher, as critics of their own see it that start anew and learn to the end.

The critics of a run have learnt from that run: what they say of two students cannot be compared. Legend: T response
tokens of a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from gkd.logits import FrozenLogits
from gkd.objectives.base import ObjectiveInputs
from gkd.objectives.critics import CriticSettings
from gkd.objectives.moment_matching import MomentCritics, Trunk
from gkd.reduce import metric_means, metric_sums

_BOTH_SIDES = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class FreshDistance:
    """Means per token; those of a side without tokens are left out."""

    distances: dict[str, float]
    """`d_off` and `d_on`: the largest moment gaps that the critics came to, in units of their bound; `tv_off` and
    `tv_on`: total variation at the same states. A distance is at most 2 * bound * total variation."""
    steps: int
    """After which the critics had learnt what they could."""
    settled: bool
    """Whether they had before the most steps allowed."""


def fresh_distance(
    batches: Sequence[ObjectiveInputs],
    settings: CriticSettings,
    *,
    trunk: Trunk,
    temperature: float = 1.0,
    learning_rate: float = 0.1,
    max_steps: int = 500,
    patience: int = 20,
    tolerance: float = 3e-3,
    seed: int = 0,
) -> FreshDistance:
    """The moment-matching distances of a student at given states, by critics that learn at those states alone.

    Args:
        batches: the states: prompts that the student has not learnt from, answered by the dataset or teacher
            (off-policy) and by the student (on-policy). Their logits must give the same whenever they are asked for.
        settings: of the critics; students are compared under the same.
        trunk: whose hidden states the critics read. Under `own` those of the dataset's text read the student's, so that
            each student is judged by a class of critics of its own; under `teacher` all are judged by one.
        temperature: divides both logits.
        learning_rate: of AdamW, without decay.
        max_steps: at which the critics stop in any case.
        patience: steps over which the distances must still grow.
        tolerance: by this share of themselves, or else the critics have settled.
        seed: of their first weights.

    Raises:
        ValueError: if the models do not give the hidden states that the critics read.
    """
    critics = MomentCritics(
        settings,
        off_policy_weight=_BOTH_SIDES,
        trunk=trunk,
        temperature=temperature,
        inner_steps=1,
        warmup_inner_steps=1,
        warmup_steps=0,
        learning_rate_multiplier=1.0,
        weight_decay=0.0,
        grad_clip=float("inf"),
    )
    frozen = [replace(batch, student=FrozenLogits(batch.student)) for batch in batches]
    critics.prepare(frozen[0], seed=seed)
    optimizer = torch.optim.AdamW(critics.parameters(), lr=learning_rate, weight_decay=0.0)
    reached: list[float] = []
    while True:
        optimizer.zero_grad()
        means = _measured(critics, frozen)
        reached.append(sum(value for name, value in means.items() if name.startswith("d_")))
        before = reached[-1 - patience] if len(reached) > patience else None
        settled = before is not None and reached[-1] - before <= tolerance * abs(reached[-1])
        if settled or len(reached) > max_steps:
            return FreshDistance(distances=means, steps=len(reached) - 1, settled=settled)
        optimizer.step()


def _measured(critics: MomentCritics, batches: Sequence[ObjectiveInputs]) -> dict[str, float]:
    """Distances and total variations; leaves the gradients of minus the distances in the critics."""
    sides = [_sides(batch) for batch in batches]
    counts = {name: max(1, sum(int(own[name].sum()) for own in sides)) for name in ("off", "on")}
    sums: dict[str, float] = {}
    for batch, own in zip(batches, sides, strict=True):
        gaps = critics.gaps(batch, critics_learn=True)
        measured: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        weights_T = sum(mask_T / counts[name] for name, mask_T in own.items())
        assert isinstance(weights_T, torch.Tensor)
        if gaps.gap_T.requires_grad:
            torch.where(batch.mask_T, -gaps.gap_T * weights_T, 0).sum().backward()
        for name, mask_T in own.items():
            measured |= {f"d_{name}": (gaps.gap_T.detach(), mask_T), f"tv_{name}": (gaps.variation_T, mask_T)}
        for name, value in metric_sums({}, measured, weights_T, batch.mask_T).items():
            sums[name] = sums.get(name, 0.0) + value
    return metric_means(sums)


def _sides(batch: ObjectiveInputs) -> dict[str, torch.Tensor]:
    return {"off": batch.mask_T & ~batch.on_policy_T, "on": batch.mask_T & batch.on_policy_T}
