"""A mixture of teachers on its way to the ranks: opened, cut into micro-batches, and learnt from."""

from dataclasses import replace

import pytest
import torch
from batches import scored_batch, step, student_settings
from tiny import save_model

from gkd.interfaces import MixedSignals
from gkd.signals import FullLogits, Mixture
from trainer import trainer_actor
from trainer.share import share_out
from trainer.student import Student
from trainer.trainer_actor import RankPart

WEIGHTS = (0.75, 0.25)


@pytest.fixture
def store(monkeypatch):
    """An object store: handles are names."""
    kept = {}
    monkeypatch.setattr(
        trainer_actor.ray, "get", lambda ref: [kept[r] for r in ref] if isinstance(ref, list) else kept[ref]
    )
    return kept


def test_each_rank_opens_what_every_teacher_says_of_its_own_samples(store):
    batches = [scored_batch(seed=seed, rows=18) for seed in (0, 1)]
    rollouts = [sample.rollout for sample in batches[0]]
    groups = [tuple(r.id for r in rollouts[3:]), tuple(r.id for r in rollouts[:3])]
    signals = []
    for number, part in enumerate((slice(3, 8), slice(0, 3))):
        names = [f"{teacher} on {number}" for teacher in "ab"]
        store |= {name: [s.signal for s in batch[part]] for name, batch in zip(names, batches, strict=True)}
        signals.append(MixedSignals(tuple(names), WEIGHTS))
    seen = []
    for share in share_out(rollouts, num_ranks=2, tokens_per_micro_batch=99, reduction="token_mean"):
        none = [None] * len(rollouts)
        for index, sample in zip(
            share.samples, RankPart(share, rollouts, groups, signals, none, none).open(), strict=True
        ):
            assert sample.signal == Mixture((batches[0][index].signal, batches[1][index].signal), WEIGHTS)
            seen.append(index)
    assert sorted(seen) == list(range(8))


@pytest.mark.parametrize("tokens_per_micro_batch", [4096, 30])
def test_learning_from_a_mixture_is_learning_from_its_probabilities(tokens_per_micro_batch, tmp_path):
    path = save_model(tmp_path / "qwen2", "qwen2")
    batches = [scored_batch(seed=seed) for seed in (0, 1)]
    mixed, summed = [], []
    for first, second in zip(*batches, strict=True):
        mixed.append(replace(first, signal=Mixture((first.signal, second.signal), WEIGHTS)))
        p = sum(w * s.signal.tensor().double().softmax(-1) for w, s in zip(WEIGHTS, (first, second), strict=True))
        summed.append(replace(first, signal=FullLogits.from_tensor(p.log().float())))
    reports = [
        step(Student(student_settings(path)), 1, batch, tokens_per_micro_batch=tokens_per_micro_batch)
        for batch in (mixed, summed)
    ]
    assert reports[0].loss == pytest.approx(reports[1].loss, rel=1e-5)
    assert reports[0].grad_norm == pytest.approx(reports[1].grad_norm, rel=1e-4)
    assert torch.isfinite(torch.tensor(reports[0].grad_norm))
