"""What travels with samples to an objective, what comes back of each, and the metrics made of it."""

import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from batches import objective_inputs, scored_batch, step, student_settings
from tiny import VOCABULARY, save_model

from gkd import divergences, logits
from gkd.interfaces import ScoredBatch
from gkd.objectives import Distill, ObjectiveOutput
from gkd.packing import pack
from gkd.stages import ByStep
from gkd.types import ScoredRollout
from trainer.metrics import step_metrics
from trainer.records import Records
from trainer.sample_data import LogprobWatch, SampleReport, sample_inputs
from trainer.share import share_out
from trainer.staleness import staleness_metrics
from trainer.step import StepReport
from trainer.student import Student
from trainer.trainer_actor import BatchRules, Learner, RankPart
from trainer.weight_sync import SyncReport

CPU = torch.device("cpu")
LENGTHS = [(1, 5), (4, 1), (7, 9), (2, 3)]


def recorded(batch, *, dataset=(), offset=0.0):
    """The samples with log-probabilities; those in `dataset` are the dataset's."""
    return [
        replace(
            sample,
            rollout=replace(
                sample.rollout,
                source="dataset" if i in dataset else "student",
                versions=None if i in dataset else (0, 0),
                logprobs=None if i in dataset else tuple(offset - t for t in range(len(sample.rollout.response_ids))),
            ),
        )
        for i, sample in enumerate(batch)
    ]


def test_log_probabilities_of_the_sampler_are_packed_and_0_in_the_datasets_sequences():
    batch = recorded(scored_batch(lengths=[(1, 2), (1, 3), (2, 1)]), dataset=[1], offset=-0.5)
    found = sample_inputs(batch, [1.0, 0.0, 2.0], CPU)
    assert found["sampler_logprobs_T"].tolist() == [-0.5, -1.5, 0, 0, 0, -0.5]
    assert found["sequence_scale_N"].tolist() == [1, 0, 2]
    assert found["rewards_N"] is None and found["advantages_N"] is None
    assert sample_inputs(scored_batch(), [1.0] * 8, CPU)["sampler_logprobs_T"] is None
    rewarded = [replace(sample, reward=float(i), advantage=-float(i)) for i, sample in enumerate(batch)]
    found = sample_inputs(rewarded, [1.0] * 3, CPU)
    assert found["rewards_N"].tolist() == [0, 1, 2] and found["advantages_N"].tolist() == [0, -1, -2]


@pytest.mark.parametrize("chunk", [None, 3])
def test_the_watch_changes_nothing_and_finds_every_log_probability(chunk, monkeypatch):
    if chunk:
        monkeypatch.setattr(logits, "_DIRECT", 0)
        monkeypatch.setattr(logits, "CHUNK_TOKENS", {"cpu": chunk})
    random = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(7, 11, generator=random), torch.randn(7, 11, generator=random)
    ids = [0, 10, 3, 3, 5, 1, 2]
    mask = torch.tensor([True] * 5 + [False, True])
    objective = Distill(divergence=divergences.forward_kl, temperature=2.0)
    results = []
    for watch in (None, LogprobWatch(7)):
        student_TV = student.clone().requires_grad_()
        output = objective(objective_inputs(student_TV, teacher, ids, lengths=(4, 3), mask_T=mask, watch=watch))
        (gradient,) = torch.autograd.grad(output.loss_T.sum(), student_TV)
        results.append((output, gradient))
    assert torch.equal(results[0][0].loss_T, results[1][0].loss_T) and torch.equal(results[0][1], results[1][1])
    expected = [math.log(student[t].double().softmax(-1)[token].item()) for t, token in enumerate(ids)]
    first, second = watch.reports(results[1][0], (4, 3))
    loss_T = results[1][0].loss_T
    assert (first.num_tokens, second.num_tokens) == (4, 2)
    assert first.loss == pytest.approx(loss_T[:4].sum().item())
    assert second.loss == pytest.approx((loss_T[4] + loss_T[6]).item())
    assert [*first.logprobs_T, *second.logprobs_T] == pytest.approx(expected, rel=1e-5)


def test_an_objective_that_makes_no_logits_leaves_nothing_to_report():
    loss_T = torch.zeros(3, requires_grad=True)
    (report,) = LogprobWatch(3).reports(ObjectiveOutput(loss_T=loss_T, mask_T=torch.ones(3, dtype=torch.bool)), (3,))
    assert np.isnan(report.logprobs_T).all() and report.num_tokens == 3


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return Student(student_settings(str(save_model(tmp_path_factory.mktemp("m") / "model", "qwen2"))))


@torch.no_grad()
def logprobs_over_shared_rows(student, rollouts):
    """Of each rollout's response, one forward pass a rollout."""
    found = []
    for rollout in rollouts:
        packed = pack([rollout.prompt_ids], [rollout.response_ids], share_rows=False)
        log_p_TV = student._forward(packed)[:, :VOCABULARY].float().log_softmax(-1)
        found.append([log_p_TV[t, token].item() for t, token in enumerate(rollout.response_ids)])
    return found


@pytest.mark.parametrize("tokens_per_micro_batch", [4096, 12])
def test_a_step_reports_the_log_probabilities_it_began_with(student, tokens_per_micro_batch):
    batch = recorded(scored_batch(lengths=LENGTHS), dataset=[1])
    expected = logprobs_over_shared_rows(student, [sample.rollout for sample in batch])
    report = step(student, 1, batch, tokens_per_micro_batch=tokens_per_micro_batch)
    own = {0, 2, 3}
    assert own <= report.samples.keys() <= own | {1}
    for i in own:
        assert report.samples[i].logprobs_T.tolist() == pytest.approx(expected[i], abs=1e-4)
        assert report.samples[i].num_tokens == len(batch[i].rollout.response_ids)
    again = step(student, 2, scored_batch(lengths=LENGTHS), tokens_per_micro_batch=tokens_per_micro_batch)
    assert again.samples == {}


def scored(rollouts, *, step=5, rewards=None):
    nothing = dict.fromkeys(("rollout_s", "teacher_s", "rollout_wait_s", "teacher_wait_s"), 0.0)
    return ScoredBatch(
        step=step, rollouts=tuple(rollouts), groups=(), signals=(), signal_bytes=0, rewards=rewards, **nothing
    )


def test_staleness_by_hand():
    """Three samples of two ages, ratios 1, 1, 2 | 1/2 | 4."""
    base = [sample.rollout for sample in scored_batch(lengths=[(1, 3), (1, 1), (1, 1), (1, 2)])]
    rollouts = [
        replace(base[0], logprobs=(-1.0, -2.0, -3.0), versions=(4, 4)),
        replace(base[1], logprobs=(-1.0,), versions=(2, 3)),
        replace(base[2], logprobs=(-2.0,), versions=(2, 2)),
        replace(base[3], source="dataset", versions=None),
    ]

    def report(i, log_ratios, loss):
        now = np.array([p + r for p, r in zip(rollouts[i].logprobs, log_ratios, strict=True)], dtype=np.float32)
        return SampleReport(loss=loss, num_tokens=len(now), logprobs_T=now)

    ln2 = math.log(2)
    reports = {0: report(0, [0, 0, ln2], 6.0), 1: report(1, [-ln2], 1.0), 2: report(2, [2 * ln2], 4.0)}
    reports[3] = SampleReport(loss=9.0, num_tokens=2, logprobs_T=np.zeros(2, dtype=np.float32))
    found = staleness_metrics(scored(rollouts), reports)
    kls = {0: (0 + 0 + (2 - 1 - ln2)) / 3, 2: ((0.5 - 1 + ln2) + (4 - 1 - 2 * ln2)) / 2}
    assert found == pytest.approx(
        {
            "staleness/ratio_mean": 8.5 / 5,
            "staleness/ratio_p95": 2 + 0.8 * 2,  # between the two largest of five
            "staleness/ratio_max": 4.0,
            "staleness/ess": 8.5**2 / (5 * (1 + 1 + 4 + 0.25 + 16)),
            "staleness/kl_to_sampler": (3 * kls[0] + 2 * kls[2]) / 5,
            "staleness/kl_age_0": kls[0],
            "staleness/kl_age_2": kls[2],
            "staleness/loss_age_0": 2.0,
            "staleness/loss_age_2": 2.5,
        },
        rel=1e-5,
    )
    assert staleness_metrics(scored(rollouts), {}) == {}
    unwatched = replace(reports[1], logprobs_T=np.full(1, np.nan, dtype=np.float32))
    assert staleness_metrics(scored(rollouts), {1: unwatched}) == {}


def test_the_kl_estimate_is_the_kl_on_average():
    """Over every token of a small vocabulary, by the sampler's probabilities."""
    random = torch.Generator().manual_seed(3)
    old, new = torch.randn(6, generator=random).double(), torch.randn(6, generator=random).double()
    p, q = old.softmax(-1), new.softmax(-1)
    base = scored_batch(lengths=[(1, 1)])[0].rollout
    total = 0.0
    for token in range(6):
        rollouts = [replace(base, logprobs=(math.log(p[token]),), versions=(0, 0))]
        reports = {0: SampleReport(loss=0.0, num_tokens=1, logprobs_T=np.array([math.log(q[token])]))}
        total += p[token].item() * staleness_metrics(scored(rollouts, step=1), reports)["staleness/kl_to_sampler"]
    assert total == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-6)


def metrics_of(batch):
    trained = StepReport(loss=1.0, metrics={}, grad_norm=0.0, learning_rate=0.1, num_tokens=1, num_micro_batches=1)
    synced = SyncReport(version=1, seconds=0.0, num_bytes=0, logprob_gap_max=None)
    return step_metrics(batch, trained, synced, train_s=0.0, wait_s=0.0)


def test_rewards_are_recorded_of_what_the_student_wrote(tmp_path):
    base = [sample.rollout for sample in scored_batch(lengths=[(1, 1)] * 3)]
    rollouts = [base[0], replace(base[1], source="dataset", versions=None), base[2]]
    found = metrics_of(scored(rollouts, step=1, rewards=(1.0, 50.0, 4.0)))
    assert (found["reward/mean"], found["reward/std"]) == (2.5, 1.5)
    assert not [key for key in metrics_of(scored(rollouts, step=1)) if key.startswith("reward/")]
    assert not [key for key in metrics_of(scored(rollouts[1:2], step=1, rewards=(1.0,))) if key.startswith("reward/")]

    with Records(tmp_path, str, rollouts_every=1, rollouts_kept=1, completed_steps=0) as records:
        records.write(1, {"step": 1}, rollouts, (1.0, 50.0, 4.0))
        records.write(2, {"step": 2}, rollouts, None)
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert ['"reward": 1.0' in lines[0], '"reward": 50.0' in lines[1], '"reward"' in lines[3]] == [True, True, False]
    dumps = [(tmp_path / "rollouts" / f"step_{n}.txt").read_text() for n in (1, 2)]
    assert "reward 1" in dumps[0] and "reward" not in dumps[1]


def test_what_the_teacher_wrote_was_generated_and_is_off_policy():
    base = [sample.rollout for sample in scored_batch(lengths=[(2, 3), (1, 2)])]
    # The teacher had a longer prompt of its own, most of it in the engine's cache.
    own = {"teacher_prompt_ids": (3,) * 8, "num_cached_tokens": 6}
    off_policy = [replace(rollout, versions=None, stop_reason="stop", logprobs=None, **own) for rollout in base]
    teacher = metrics_of(scored([replace(rollout, source="teacher") for rollout in off_policy], step=7))
    assert (teacher["tokens/generated"], teacher["rollout/mean_length"], teacher["source/on_policy"]) == (5, 2.5, 0.0)
    assert (teacher["staleness/max"], teacher["rollout/stopped_fraction"]) == (0, 1.0)
    assert teacher["rollout/prefix_cached_fraction"] == 0.75
    assert not [
        key for key in teacher if key.startswith("staleness/") and key not in ("staleness/max", "staleness/mean")
    ]
    dataset = metrics_of(scored([replace(rollout, source="dataset") for rollout in off_policy], step=7))
    assert (dataset["tokens/generated"], dataset["rollout/mean_length"]) == (0, None)


def test_the_share_that_a_cache_gave_is_recorded_where_it_was_asked():
    batch = scored([scored_batch(lengths=[(1, 1)])[0].rollout], step=1)
    assert metrics_of(replace(batch, num_looked_up=4, num_found=3))["teacher/cache_hits"] == 0.75
    assert "teacher/cache_hits" not in metrics_of(batch)


class FakeRank:
    """A rank whose calls are made at once; its part has been pickled, as Ray would."""

    def __init__(self):
        self.step = self

    def remote(self, number, part):
        opened = pickle.loads(pickle.dumps(part)).open()
        samples = {
            index: SampleReport(loss=sample.reward, num_tokens=1, logprobs_T=np.zeros(1))
            for index, sample in zip(part.share.samples, opened, strict=True)
        }
        self.opened = opened
        report = StepReport(loss=1, metrics={}, grad_norm=0, learning_rate=0, num_tokens=1, num_micro_batches=1)
        return replace(report, samples=samples)


def test_advantages_are_of_the_whole_batch_whatever_the_ranks(monkeypatch):
    monkeypatch.setattr("trainer.trainer_actor.ray.get", lambda calls, timeout=None: calls)
    rollouts = [sample.rollout for sample in scored_batch(lengths=LENGTHS)]
    rewards = [1.0, 2.0, 3.0, 6.0]
    found = []
    for num_ranks in (1, 3):
        ranks = [FakeRank() for _ in range(num_ranks)]
        learner = Learner(
            ranks,
            rules=ByStep(
                [(1, BatchRules("token_mean", lambda _, rewards: [r - sum(rewards) / len(rewards) for r in rewards]))]
            ),
            tokens_per_micro_batch=16,
            timeout_s=5,
        )
        report = learner.step(1, rollouts, [[r.id for r in rollouts]], [None], rewards)
        assert {index: sample.loss for index, sample in report.samples.items()} == dict(enumerate(rewards))
        found.append({s.rollout.id: (s.reward, s.advantage) for rank in ranks for s in rank.opened})
    assert found[0] == found[1] == {r.id: (w, w - 3.0) for r, w in zip(rollouts, rewards, strict=True)}


def test_without_rewards_samples_carry_none():
    batch = scored_batch(lengths=LENGTHS)
    rollouts = [sample.rollout for sample in batch]
    (share,) = share_out(rollouts, num_ranks=1, tokens_per_micro_batch=64, reduction="token_mean")
    part = RankPart(share, rollouts, [[r.id for r in rollouts]], [None], [None] * 4, [None] * 4)
    assert part.open() == [ScoredRollout(rollout=rollout, signal=None) for rollout in rollouts]


def test_shares_scale_sums_over_the_students_sequences_alone():
    batch = recorded(scored_batch(lengths=LENGTHS), dataset=[2])
    rollouts = [sample.rollout for sample in batch]
    for reduction in ("token_mean", "sequence_mean"):
        shares = share_out(rollouts, num_ranks=2, tokens_per_micro_batch=16, reduction=reduction)
        # A token weighs weight * scale: 1 / 3 in each of the student's three sequences, 0 in the dataset's.
        weighed = {
            share.samples[i]: share.weights[i] * share.sequence_scales[i]
            for share in shares
            for places in share.micro_batches
            for i in places
        }
        assert weighed == pytest.approx({0: 1 / 3, 1: 1 / 3, 2: 0.0, 3: 1 / 3})
