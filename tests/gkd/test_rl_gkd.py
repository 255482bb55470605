"""The reward's gradient, proven by enumerating every response of a toy policy, and what baselines may not change.

The policy is a table: one row of logits for every state, which is what was written so far. |V| = 3, of which token 0
stops; responses have 1 to 3 tokens. Everything is float64.
"""

import itertools

import pytest
import torch
from batches import objective_inputs

from gkd import divergences, logits
from gkd.advantages import advantages
from gkd.config.objective import RlGkdObjective
from gkd.objectives import build_objective
from gkd.objectives.importance import importance_ratios
from gkd.objectives.rl_gkd import RlGkd
from gkd.reduce import sequence_sum_scales, sequence_token_weights, weighted_sum
from gkd.types import Rollout, SampleId

STOP, VOCABULARY, LONGEST = 0, 3, 3
STATES = [s for n in range(LONGEST) for s in itertools.product(range(1, VOCABULARY), repeat=n)]
ROW = {state: i for i, state in enumerate(STATES)}
RESPONSES = [
    y
    for n in range(1, LONGEST + 1)
    for y in itertools.product(range(VOCABULARY), repeat=n)
    if STOP not in y[:-1] and (y[-1] == STOP or n == LONGEST)
]


def table(seed):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(len(STATES), VOCABULARY, generator=random, dtype=torch.float64)


STUDENT, TEACHER, SAMPLER = table(0), table(1), table(2)


def reward(y):
    return 1.5 * y.count(2) - 0.5 * len(y) + (y[0] == 1)


def rows(y):
    return [ROW[y[:t]] for t in range(len(y))]


def probability(policy, y):
    return policy.softmax(-1)[rows(y), list(y)].prod()


def kl(teacher, student):
    """KL(T || S) per state, written out."""
    p, q = teacher.softmax(-1), student.softmax(-1)
    return (p * (p.log() - q.log())).sum(-1)


def expected_objective(student, *, alpha):
    """-(1 - alpha) E r + alpha E D with D the mean over positions, and no gradient through who writes y in D."""
    total = torch.zeros((), dtype=torch.float64)
    per_state = kl(TEACHER, student)
    for y in RESPONSES:
        p = probability(student, y)
        total = total - (1 - alpha) * p * reward(y) + alpha * p.detach() * per_state[rows(y)].mean()
    return total


def rollout(y, i=0, *, source="student"):
    reason = "stop" if y[-1] == STOP else "length"
    return Rollout(
        id=SampleId(0, i, 0), prompt_ids=(1,), response_ids=y, stop_reason=reason, source=source, versions=(0, 0)
    )


def batch_loss(
    objective, student, batch, *, reduction, baseline="none", sampler=None, sources=None, split=None, teacher=TEACHER
):
    """The reduced loss of a whole batch of responses, in as many micro-batches as `split` says."""
    sources = sources or ["student"] * len(batch)
    rollouts = [rollout(y, i, source=source) for i, (y, source) in enumerate(zip(batch, sources, strict=True))]
    weights = sequence_token_weights([len(y) for y in batch], reduction)
    scales = sequence_sum_scales(weights, [source == "student" for source in sources])
    given = advantages(rollouts, [reward(y) for y in batch], baseline=baseline, normalize_std=False)
    total = torch.zeros((), dtype=torch.float64)
    for places in split or [range(len(batch))]:
        members = [batch[i] for i in places]
        at = [row for y in members for row in rows(y)]
        ids = torch.tensor([token for y in members for token in y])
        lengths = tuple(len(y) for y in members)
        output = objective(
            objective_inputs(
                student[at],
                teacher[at],
                ids,
                lengths=lengths,
                on_policy_N=torch.tensor([sources[i] == "student" for i in places]),
                advantages_N=torch.tensor([given[i] for i in places], dtype=torch.float64),
                sequence_scale_N=torch.tensor([scales[i] for i in places], dtype=torch.float64),
                sampler_logprobs_T=None if sampler is None else sampler.log_softmax(-1)[at, ids],
            )
        )
        weights_T = torch.tensor([weights[i] for i in places], dtype=torch.float64).repeat_interleave(
            torch.tensor(lengths)
        )
        assert output.mask_T.all()
        # As `weighted_sum` does, in float64.
        total = total + (output.loss_T * weights_T).sum()
    return total


def gradient(function):
    student = STUDENT.clone().requires_grad_()
    (found,) = torch.autograd.grad(function(student), student)
    return found


def rl_gkd(alpha, **options):
    settings = {"divergence": divergences.forward_kl, "temperature": 1.0, "ratio_clip": 1e9} | options
    return RlGkd(alpha=alpha, **settings)


def test_the_toy_is_a_distribution():
    assert len(RESPONSES) == 15
    assert sum(probability(STUDENT, y) for y in RESPONSES) == pytest.approx(1.0)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_expected_gradient_of_one_response_is_that_of_the_objective(alpha):
    """Over batches of one, with the paper's mean over positions, both terms are exact."""

    def surrogate(student):
        return sum(
            probability(student, y).detach() * batch_loss(rl_gkd(alpha), student, [y], reduction="sequence_mean")
            for y in RESPONSES
        )

    expected = gradient(lambda student: expected_objective(student, alpha=alpha))
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(gradient(surrogate), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("baseline", ["none", "batch_mean"])
def test_baseline_and_reduction_leave_the_rewards_gradient_exact(reduction, baseline):
    """Over all 225 batches of two responses of different lengths: a baseline that saw the sample would shrink it."""

    def surrogate(student):
        return sum(
            (probability(student, a) * probability(student, b)).detach()
            * batch_loss(rl_gkd(0.0), student, [a, b], reduction=reduction, baseline=baseline)
            for a in RESPONSES
            for b in RESPONSES
        )

    expected = gradient(lambda student: expected_objective(student, alpha=0.0))
    torch.testing.assert_close(gradient(surrogate), expected, rtol=1e-6, atol=1e-7)


def test_the_dataset_has_no_part_in_the_rewards_gradient_and_does_not_dilute_it():
    y, other = (2, 1, 0), (1, 0)

    def alone(student):
        return batch_loss(rl_gkd(0.0), student, [y], reduction="token_mean")

    def mixed(student):
        return batch_loss(
            rl_gkd(0.0), student, [other, y, other], reduction="token_mean", sources=["dataset", "student", "dataset"]
        )

    torch.testing.assert_close(gradient(mixed), gradient(alone), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_splits_into_micro_batches_change_nothing(reduction):
    batch = [(2, 1, 0), (0,), (1, 1, 2), (2, 0)]
    sources = ["student", "student", "dataset", "student"]
    whole, parts = (
        gradient(
            lambda student, split=split: batch_loss(
                rl_gkd(0.4), student, batch, reduction=reduction, baseline="batch_mean", sources=sources, split=split
            )
        )
        for split in (None, [[1], [3, 0], [2]])
    )
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-9)


def test_samples_of_an_older_student_are_weighted_token_by_token():
    """For one-token responses the weight is exact: the expectation under the sampler is the student's gradient."""
    first = [(0,), (1,), (2,)]

    def surrogate(student):
        return sum(
            SAMPLER[0].softmax(-1)[y[0]]
            * batch_loss(rl_gkd(0.0), student, [y], reduction="token_mean", sampler=SAMPLER)
            for y in first
        )

    expected = gradient(lambda student: -sum(student[0].softmax(-1)[y[0]] * reward(y) for y in first))
    torch.testing.assert_close(gradient(surrogate), expected, rtol=1e-6, atol=1e-7)


CLIP, TEMPERATURE, ALPHA = 1.1, 2.0, 0.3
RAGGED, SOURCES = [(2, 1, 0), (1, 0), (1, 1, 2), (2, 0)], ["student", "dataset", "student", "student"]


def ragged_loss(student):
    objective = rl_gkd(ALPHA, temperature=TEMPERATURE, ratio_clip=CLIP)
    return batch_loss(objective, student, RAGGED, reduction="sequence_mean", sampler=SAMPLER, sources=SOURCES)


def test_the_loss_against_a_twin_where_it_is_tempered_and_clipped():
    """Token by token: the divergence at the loss temperature, log-probabilities and ratios at temperature 1."""
    ratios = []

    def twin(student):
        total = torch.zeros((), dtype=torch.float64)
        for y, source in zip(RAGGED, SOURCES, strict=True):
            for t, token in enumerate(y):
                row = ROW[y[:t]]
                divergence = kl(TEACHER[row] / TEMPERATURE, student[row] / TEMPERATURE)
                total = total + ALPHA * divergence / len(y) / len(RAGGED)
                if source == "student":
                    logprob = student[row].log_softmax(-1)[token]
                    ratios.append((logprob.detach() - SAMPLER[row].log_softmax(-1)[token]).exp().item())
                    gain = min(ratios[-1], CLIP) * reward(y) * logprob
                    total = total - (1 - ALPHA) * gain / SOURCES.count("student")
        return total

    torch.testing.assert_close(ragged_loss(STUDENT), twin(STUDENT), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradient(ragged_loss), gradient(twin), rtol=1e-6, atol=1e-9)
    assert min(ratios) < CLIP < max(ratios)


@pytest.mark.parametrize("chunk", [1, 4])
def test_chunks_change_nothing(chunk, monkeypatch):
    whole = gradient(ragged_loss)
    monkeypatch.setattr(logits, "_DIRECT", 0)
    monkeypatch.setattr(logits, "CHUNK_TOKENS", {"cpu": chunk})
    torch.testing.assert_close(gradient(ragged_loss), whole, rtol=1e-9, atol=1e-12)


def test_ratios_are_clipped_above_and_carry_no_gradient():
    now = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    then = torch.tensor([-2.0, -1.0, -0.5])
    ratios = importance_ratios(now, then, clip=2.0)
    assert not ratios.requires_grad
    torch.testing.assert_close(ratios, torch.tensor([2.0, 0.36787944, 1.0]))
    assert importance_ratios(now, None, clip=2.0).tolist() == [1.0, 1.0, 1.0]


def test_at_alpha_1_it_is_distillation():
    batch = [(2, 1, 0), (1, 0)]
    found = gradient(lambda student: batch_loss(rl_gkd(1.0), student, batch, reduction="token_mean"))
    at = [row for y in batch for row in rows(y)]
    expected = gradient(lambda student: kl(TEACHER, student)[at].mean())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("divergence", [divergences.forward_kl, divergences.reverse_kl])
def test_less_alpha_more_reward_and_farther_from_the_teacher(divergence):
    """METHODS 1.7(4), by expectations instead of samples: the trade-off curve."""
    rewards, distances = [], []
    for alpha in (1.0, 0.5, 0.0):
        student = STUDENT.clone().requires_grad_()
        objective = rl_gkd(alpha, divergence=divergence)
        for _ in range(100):
            loss = sum(
                probability(student, y).detach() * batch_loss(objective, student, [y], reduction="sequence_mean")
                for y in RESPONSES
            )
            (found,) = torch.autograd.grad(loss, student)
            student = (student - 1.0 * found).detach().requires_grad_()
        probabilities = [probability(student, y).item() for y in RESPONSES]
        per_state = divergence(student.detach(), TEACHER)
        rewards.append(sum(p * reward(y) for p, y in zip(probabilities, RESPONSES, strict=True)))
        distances.append(
            sum(p * per_state[rows(y)].mean().item() for p, y in zip(probabilities, RESPONSES, strict=True))
        )
    assert distances[0] < 0.02
    for lower, higher in itertools.pairwise(rewards):
        assert higher > lower + 0.02, rewards
    for lower, higher in itertools.pairwise(distances):
        assert higher > lower + 0.02, distances
    assert rewards[-1] > max(map(reward, RESPONSES)) - 0.2


def batch_of(*prompts, sources=None):
    """Rollouts of prompts, by their number."""
    sources = sources or ["student"] * len(prompts)
    return [
        Rollout(
            id=SampleId(0, prompt, i),
            prompt_ids=(1,),
            response_ids=(2,),
            stop_reason="length",
            source=source,
            versions=(0, 0),
        )
        for i, (prompt, source) in enumerate(zip(prompts, sources, strict=True))
    ]


def test_advantages_by_hand():
    def of(batch, rewards, baseline, *, normalize_std=False):
        return advantages(batch, rewards, baseline=baseline, normalize_std=normalize_std)

    batch = batch_of(0, 0, 1, 1)
    assert of(batch, [1, 0, 5, 7], "none") == [1, 0, 5, 7]
    assert of(batch, [1, 0, 5, 7], "batch_mean") == pytest.approx([1 - 4, 0 - 13 / 3, 5 - 8 / 3, 7 - 2])
    assert of(batch, [1, 0, 5, 7], "prompt_mean") == [1, -1, -2, 2]
    # Standard deviations with n - 1: sqrt(1/2) and sqrt(2).
    normalized = of(batch, [1, 0, 5, 7], "prompt_mean", normalize_std=True)
    assert normalized == pytest.approx([2**0.5, -(2**0.5), -(2**0.5), 2**0.5])
    # What all rewards have in common is no news.
    for baseline in ("batch_mean", "prompt_mean"):
        assert of(batch, [101, 100, 105, 107], baseline) == pytest.approx(of(batch, [1, 0, 5, 7], baseline))
    # Equal rewards teach nothing, however they are rounded; nor does a sample that is alone.
    assert of(batch_of(0, 0, 0), [0.1, 0.1, 0.1], "prompt_mean", normalize_std=True) == [0, 0, 0]
    assert of(batch_of(0, 1), [3, 4], "prompt_mean") == [0, 0]
    mixed = batch_of(0, 0, 0, sources=["student", "dataset", "student"])
    assert of(mixed, [1, 100, 3], "batch_mean") == [-2, 0, 2]
    assert of(mixed, [1, 100, 3], "none") == [1, 0, 3]


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_scales_make_a_mean_over_sequences_of_sums(reduction):
    lengths, chosen = [3, 0, 5, 2], [True, True, False, True]
    weights = sequence_token_weights(lengths, reduction)
    scales = sequence_sum_scales(weights, chosen)
    assert scales[1] == scales[2] == 0
    values = [[1.0, 2.0, 4.0], [], [9.0] * 5, [3.0, -1.0]]
    total = sum(w * s * sum(v) for w, s, v in zip(weights, scales, values, strict=True))
    assert total == pytest.approx((7.0 + 2.0) / 2)


def test_what_is_built_and_what_is_missing():
    config = RlGkdObjective.model_validate(
        {"type": "rl_gkd", "divergence": {"type": "reverse_kl"}, "alpha": 0.25, "temperature": 2}
    )
    objective = build_objective(config)
    assert isinstance(objective, RlGkd) and objective.needs_reward
    assert (objective.alpha, objective.temperature, objective.ratio_clip) == (0.25, 2, 2.0)
    inputs = objective_inputs(STUDENT, TEACHER)
    with pytest.raises(ValueError, match="no rewards"):
        objective(inputs)


def test_an_impossible_token_of_the_dataset_does_no_harm():
    student = torch.tensor([[0.0, -torch.inf], [0.0, 0.0]], requires_grad=True)
    output = rl_gkd(0.0, divergence=lambda s, t: s.sum(-1) * 0)(
        objective_inputs(
            student,
            torch.zeros(2, 2),
            [1, 1],
            lengths=(1, 1),
            on_policy_N=torch.tensor([False, True]),
            advantages_N=torch.tensor([0.0, 1.0]),
            sequence_scale_N=torch.tensor([0.0, 1.0]),
            mask_T=torch.tensor([False, True]),
        )
    )
    loss = weighted_sum(output.loss_T, torch.ones(2), output.mask_T)
    assert loss.item() == pytest.approx(0.6931, abs=1e-4)
