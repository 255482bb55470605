"""Moment matching with a real DeepSpeed student: critics learn, the student learns from them, both go on from disk."""

import itertools
import threading
from dataclasses import replace

import pytest
import torch
from batches import step, student_settings
from tiny import VOCABULARY, make_model, save_model

from gkd.arrays import to_array
from gkd.config.objective import MomentMatchingObjective, SumObjective
from gkd.fresh_distance import fresh_distance
from gkd.head import HeadWeights
from gkd.objectives import build_objective
from gkd.objectives.base import adversaries_of
from gkd.objectives.critics import CriticSettings
from gkd.packing import pack
from gkd.response_forward import ResponseForward
from gkd.signals import HiddenStates
from gkd.types import Rollout, SampleId, ScoredRollout
from trainer.adversary import AdversaryAscent
from trainer.lora import LoraSettings
from trainer.micro_batch import MicroBatches
from trainer.share import share_out
from trainer.step import TrainingDiverged
from trainer.student import Student
from trainer.teacher_source import SentSignals

ROWS = VOCABULARY
LENGTHS = [(1, 5), (4, 1), (7, 9), (2, 3), (3, 8), (5, 2)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("student") / "qwen2", "qwen2", rows=24)


@pytest.fixture(scope="module")
def teacher():
    """Of another architecture than the student, hooked."""
    return ResponseForward(make_model("llama", seed=5))


def matching(**changes):
    return MomentMatchingObjective.model_validate({"type": "moment_matching"} | changes)


QUICK = matching(inner_steps=2, warmup_inner_steps=3, warmup_steps=1, future_credit="mc", critic={"init_scale": 0.3})

# Here student and teacher begin as strangers, whose heads are at no optimum, so that critics may read the student; and
# critics that lag behind are run away from.
FAST_CRITICS = matching(trunk="own", inner_steps=3, warmup_steps=10, critic={"lr_multiplier": 100})


def student_of(model, teacher, *, objective=QUICK, **changes):
    student = Student(student_settings(model, objective=objective, rows=ROWS, **changes))
    student.take_heads({"teacher": HeadWeights.of(teacher._model, rows=ROWS)})
    return student


@torch.no_grad()
def scored(teacher, rollouts):
    """With the hidden states that a teacher's worker sends."""
    packed = pack([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts], share_rows=False)
    parts = teacher.hidden(packed).split(list(packed.response_lengths))
    return [ScoredRollout(rollout=r, signal=HiddenStates(to_array(h))) for r, h in zip(rollouts, parts, strict=True)]


def rollout(number, prompt, response, source):
    return Rollout(
        id=SampleId(0, number, 0),
        prompt_ids=tuple(prompt),
        response_ids=tuple(response),
        stop_reason="length",
        source=source,
        versions=(0, 0) if source == "student" else None,
    )


def batch(teacher, *, seed=0, lengths=LENGTHS):
    """Random texts, every other one the student's own."""
    random = torch.Generator().manual_seed(seed)

    def tokens(count):
        return torch.randint(2, ROWS, (count,), generator=random).tolist()

    return scored(
        teacher,
        [rollout(i, tokens(p), tokens(r), ("student", "dataset")[i % 2]) for i, (p, r) in enumerate(lengths)],
    )


def critics_of(student):
    return [p.detach().clone() for ascent in student._stage._ascents for p in ascent._adversary.parameters()]


def trained(model, teacher, *, tokens=4096, steps=3, reduction="token_mean", **changes):
    student = student_of(model, teacher, **changes)
    batches = [batch(teacher, seed=seed) for seed in range(steps)]
    reports = [
        step(student, i + 1, b, tokens_per_micro_batch=tokens, reduction=reduction) for i, b in enumerate(batches)
    ]
    return reports, critics_of(student)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_splits_and_sharding_change_neither_losses_nor_critics(model, teacher, reduction):
    reports, critics = trained(model, teacher, reduction=reduction)
    assert [p.shape for p in critics] == [(ROWS, 64), (ROWS, 64)]
    for changes in (
        {"tokens": 30},
        {"tokens": 1},
        {"zero_stage": 1},
        {"zero_stage": 2},
        {"zero_stage": 3, "tokens": 30},
    ):
        others, other_critics = trained(model, teacher, reduction=reduction, **changes)
        for report, other in zip(reports, others, strict=True):
            assert other.loss == pytest.approx(report.loss, rel=1e-4, abs=1e-5)
            assert other.metrics == pytest.approx(report.metrics, rel=1e-3, abs=1e-5)
        for own, same in zip(critics, other_critics, strict=True):
            torch.testing.assert_close(own, same, rtol=1e-4, atol=1e-4)


def test_every_step_says_what_was_matched_and_the_bound_holds(model, teacher):
    reports, _ = trained(model, teacher, steps=6)
    for report in reports:
        found = report.metrics
        assert found.keys() >= {"d_off", "d_on", "tv_off", "tv_on", "critic_loss", "critic_grad_norm"}
        assert abs(found["d_off"]) <= 2 * found["tv_off"] and abs(found["d_on"]) <= 2 * found["tv_on"]
        assert found["critic_grad_norm"] > 0
    # The loss is the weighted distance: with weights of a half, and each side its share of the tokens.
    off, on = (sum(r for i, (_, r) in enumerate(LENGTHS) if i % 2 == side) for side in (1, 0))
    assert report.loss == pytest.approx((off * found["d_off"] + on * found["d_on"]) / (off + on) / 2, rel=1e-4)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_saved_student_goes_on_bit_for_bit_and_its_critics_too(model, teacher, zero_stage, tmp_path):
    batches = [batch(teacher, seed=seed) for seed in range(4)]

    def go_on(student, numbers):
        return [step(student, number, batches[number - 1]) for number in numbers]

    whole = student_of(model, teacher, zero_stage=zero_stage)
    expected = [(report.loss, report.metrics) for report in go_on(whole, (1, 2, 3, 4))]
    first = student_of(model, teacher, zero_stage=zero_stage)
    go_on(first, (1, 2))
    first.save(tmp_path)
    second = student_of(model, teacher, zero_stage=zero_stage)
    second.load(tmp_path, completed_steps=2)
    assert [(report.loss, report.metrics) for report in go_on(second, (3, 4))] == expected[2:]
    assert all(torch.equal(a, b) for a, b in zip(critics_of(second), critics_of(whole), strict=True))


def test_the_students_own_states_serve_both_critics(model, teacher):
    """`trunk: student`: any whole distribution will do. Students are of different widths here than their teacher."""
    objective = matching(trunk="student", critic={"rank": 4})
    reports, critics = trained(model, teacher, objective=objective, steps=2)
    assert [p.shape for p in critics] == [(4, 64), (ROWS, 4)] * 2
    assert reports[1].metrics["d_on"] > 0


def test_critics_do_not_learn_from_tokens_that_weigh_nothing(model, teacher):
    weighted = matching(inner_steps=2, token_weight={"type": "first_part", "fraction": 0.5})

    def critics_after(changed=None):
        student, samples = student_of(model, teacher, objective=weighted), batch(teacher)
        if changed is not None:
            for sample in samples[2:4]:  # one of each side, of more than one token
                sample.signal.hidden_TH[changed] += 1
        step(student, 1, samples)
        return critics_of(student)

    expected = critics_after()
    assert all(torch.equal(a, b) for a, b in zip(critics_after(changed=-1), expected, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(critics_after(changed=0), expected, strict=True))


def test_a_sum_trains_its_terms_critics(model, teacher):
    """With an anchor of maximum likelihood on the dataset's text, as the method wants it."""
    terms = [{"objective": QUICK.model_dump()}, {"weight": 0.25, "objective": {"type": "sft"}}]
    objective = SumObjective.model_validate({"type": "sum", "terms": terms})
    reports, critics = trained(model, teacher, objective=objective)
    alone, alone_critics = trained(model, teacher)
    first, first_alone = reports[0].metrics, alone[0].metrics
    assert first["critic_loss"] == first_alone["critic_loss"]
    for name in ("d_off", "d_on", "tv_off", "tv_on"):
        assert first[f"moment_matching_{name}"] == pytest.approx(first_alone[name], rel=1e-4)
    share = sum(r for i, (_, r) in enumerate(LENGTHS) if i % 2) / sum(r for _, r in LENGTHS)
    assert reports[0].loss == pytest.approx(alone[0].loss + 0.25 * share * first["sft_nll"], rel=1e-4)
    assert len(critics) == len(alone_critics) == 2


def test_two_pairs_of_critics_have_metrics_of_their_own(model, teacher):
    terms = [{"objective": QUICK.model_dump()}, {"objective": QUICK.model_copy(update={"inner_steps": 1}).model_dump()}]
    reports, critics = trained(model, teacher, objective=SumObjective.model_validate({"type": "sum", "terms": terms}))
    assert len(critics) == 4
    last = reports[-1].metrics
    assert last["critic_loss_1"] != last["critic_loss_2"] and "critic_loss" not in last
    assert last["critic_grad_norm_1"] > 0 and last["critic_grad_norm_2"] > 0


def test_the_students_own_base_may_be_the_teacher(model, teacher):
    """Its hidden states are there too; while the adapter has learnt nothing no critic finds a difference."""
    samples = [ScoredRollout(rollout=sample.rollout, signal=None) for sample in batch(teacher)]
    lora = LoraSettings(r=4, alpha=8.0, targets="all-linear", dropout=0.0)
    student = student_of(model, teacher, lora=lora, base_is_teacher=True)
    metrics = step(student, 1, samples).metrics
    assert metrics["d_on"] == pytest.approx(0, abs=1e-6) and metrics["tv_on"] == pytest.approx(0, abs=1e-5)
    assert metrics["critic_grad_norm"] < 1e-5


def test_a_critic_rests_while_no_token_concerns_it(model, teacher):
    """As in every other step where sources are mixed per step."""
    student = student_of(model, teacher)
    mixed = batch(teacher)
    step(student, 1, mixed)
    off, on = critics_of(student)
    report = step(student, 2, [sample for sample in mixed if sample.rollout.source == "student"])
    off_after, on_after = critics_of(student)
    assert torch.equal(off, off_after) and not torch.equal(on, on_after)
    assert "d_off" not in report.metrics and "d_on" in report.metrics


def test_a_distance_that_is_no_number_changes_neither_side(model, teacher):
    student = student_of(model, teacher)
    good = batch(teacher)
    step(student, 1, good)
    before = [*critics_of(student), *(p.detach().clone() for p in student._model.parameters())]
    bad = batch(teacher, seed=1)
    bad[2].signal.hidden_TH[0, 0] = float("nan")
    with pytest.raises(TrainingDiverged, match="critics"):
        step(student, 2, bad)
    after = [*critics_of(student), *student._model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


class JoinedRanks:
    """Stands in for the engines of ranks that run as threads."""

    def __init__(self, count):
        self._barrier = threading.Barrier(count, timeout=60)
        self._given = []

    def _exchange(self, value):
        self._given.append(value)
        self._barrier.wait()
        given = list(self._given)
        if self._barrier.wait() == 0:
            self._given.clear()
        self._barrier.wait()
        return given

    def add_up(self, tensors):
        for tensor, given in zip(tensors, zip(*self._exchange([t.clone() for t in tensors]), strict=True), strict=True):
            tensor.copy_(torch.stack(sorted(given, key=lambda t: t.sum().item())).sum(0))

    def sum_over_ranks(self, values):
        given = self._exchange(dict(values))
        return {name: sum(one[name] for one in given) for name in values}


def test_ranks_change_nothing(teacher):
    """Also where all tokens of one side are on one rank, and where a rank has nothing of its own."""
    samples = batch(teacher, lengths=[(1, 9), (2, 4)])

    def critics_after(num_ranks):
        joined = JoinedRanks(num_ranks)
        shares = share_out(
            [s.rollout for s in samples], num_ranks=num_ranks, tokens_per_micro_batch=12, reduction="token_mean"
        )
        found = [None] * num_ranks
        ready = [ascent_of(joined, teacher) for _ in shares]

        def run(rank):
            ascent, own = ready[rank], [samples[i] for i in shares[rank].samples]
            for number in (1, 2):
                ascent(number, own, shares[rank], learning_rate=1e-2)
            found[rank] = [p.detach() for p in ascent._adversary.parameters()]

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(num_ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    (expected,) = critics_after(1)
    for num_ranks in (2, 3):
        for rank in critics_after(num_ranks):
            for own, same in zip(rank, expected, strict=True):
                torch.testing.assert_close(own, same, rtol=1e-4, atol=1e-4)


def ascent_of(engine, teacher):
    (critics,) = adversaries_of(build_objective(QUICK))
    forward = ResponseForward(make_model("qwen2"))
    sent = SentSignals(rows=ROWS, device=torch.device("cpu"))
    sent.take_heads({"teacher": HeadWeights.of(teacher._model, rows=ROWS)})
    return AdversaryAscent(critics, engine, MicroBatches(forward, sent, rows=ROWS), seed=0)


def test_critics_alone_climb_to_a_plateau(model, teacher):
    student = student_of(model, teacher, objective=matching(warmup_steps=0))
    samples = batch(teacher)
    (share,) = share_out([s.rollout for s in samples], num_ranks=1, tokens_per_micro_batch=4096, reduction="token_mean")
    climbed = [
        -student._stage._ascents[0](number, samples, share, learning_rate=1e-3)["critic_loss"]
        for number in range(1, 121)
    ]
    assert all(later >= earlier - 1e-4 for earlier, later in itertools.pairwise(climbed))
    first, last = climbed[10] - climbed[0], climbed[-1] - climbed[-11]
    assert climbed[-1] > 20 * abs(climbed[0]) and first > 0.05 and last < 0.2 * first


@torch.no_grad()
def written(model, prompts, *, count, seed, first=0):
    """What a model samples at temperature 1, as a batch of prompts of one length."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.tensor(prompts)
    for _ in range(count):
        probabilities = model(input_ids=ids, use_cache=False).logits[:, -1, :ROWS].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=random)], dim=1)
    return [row[len(prompts[0]) :] for row in ids.tolist()]


def test_both_players_bring_the_student_nearer_as_fresh_critics_see_it(model, teacher):
    """On prompts that were not trained on."""
    student = student_of(model, teacher, objective=FAST_CRITICS, learning_rate=1e-3)

    def answered(seed, count=16):
        """Half by the teacher, half by the student as it is now."""
        random = torch.Generator().manual_seed(seed)
        prompts = torch.randint(2, ROWS, (count, 3), generator=random).tolist()
        student._model.eval()
        half = count // 2
        answers = written(teacher._model, prompts[:half], count=6, seed=seed)
        own = written(student._model, prompts[half:], count=6, seed=seed)
        sources = ["dataset"] * half + ["student"] * half
        given = zip(prompts, answers + own, sources, strict=True)
        return scored(teacher, [rollout(i, p, r, source) for i, (p, r, source) in enumerate(given)])

    def distances():
        held_out = answered(10_000, count=64)
        (share,) = share_out(
            [s.rollout for s in held_out], num_ranks=1, tokens_per_micro_batch=4096, reduction="token_mean"
        )
        found = fresh_distance(student.states(held_out, share), CriticSettings(), trunk="own")
        assert found.settled
        return found.distances

    before = distances()
    for number in range(1, 61):
        step(student, number, answered(number))
    after = distances()
    for side in ("off", "on"):
        assert 0 < after[f"d_{side}"] < 0.9 * before[f"d_{side}"], (before, after)
        assert after[f"d_{side}"] <= 2 * after[f"tv_{side}"]
        assert after[f"tv_{side}"] < before[f"tv_{side}"]


def test_the_dataset_may_be_all_there_is(model, teacher):
    objective = FAST_CRITICS.model_copy(update={"off_policy_weight": 1.0})
    student = student_of(model, teacher, objective=objective, learning_rate=1e-3)
    samples = [
        ScoredRollout(rollout=replace(s.rollout, source="dataset", versions=None), signal=s.signal)
        for s in batch(teacher)
    ]
    reports = [step(student, number, samples) for number in range(1, 31)]
    assert len(critics_of(student)) == 1
    assert reports[-1].metrics["tv_off"] < 0.9 * reports[0].metrics["tv_off"]
