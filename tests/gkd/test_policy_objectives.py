"""Policy-gradient objectives against float64 twins, and their expected gradients against enumeration."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from batches import objective_inputs

from gkd import logits as logits_module
from gkd.objectives.minillm import MiniLlm
from gkd.objectives.monte_carlo_kl import MonteCarloKl
from gkd.objectives.sampled_kl import SampledKl
from gkd.reduce import metric_means, metric_sums, weighted_sum
from gkd.signals import SampledLogprobs
from gkd.teacher_view import SampledView

LENGTHS = (4, 1, 3, 5)
ON_POLICY = (True, True, False, True)
ROWS, TOKENS = 6, sum(LENGTHS)
MASKED = 10
"""A token of the last sequence that does not count."""


def sampled_kl(*, temperature=1.0, gamma=0.0, length_normalize=False, ratio_clip=None):
    return SampledKl(temperature=temperature, gamma=gamma, length_normalize=length_normalize, ratio_clip=ratio_clip)


def minillm(*, temperature=1.0, gamma=1.0, length_normalize=False, single_step=True, clip_range=None):
    return MiniLlm(
        temperature=temperature,
        gamma=gamma,
        length_normalize=length_normalize,
        single_step=single_step,
        clip_range=clip_range,
    )


def problem(*, recorded=True, seed=0):
    """Ragged sequences in float64; inputs, student logits and teacher logits."""
    random = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(TOKENS, ROWS, generator=random, dtype=torch.float64).mul(1.5) for _ in range(2))
    student.requires_grad_()
    ids = torch.randint(0, ROWS, (TOKENS,), generator=random)
    mask = torch.arange(TOKENS) != MASKED
    sampler = student.detach().log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    sampler = sampler + 0.6 * torch.randn(TOKENS, generator=random, dtype=torch.float64)
    inputs = objective_inputs(
        student,
        teacher,
        ids,
        mask_T=mask,
        lengths=LENGTHS,
        on_policy_N=torch.tensor(ON_POLICY),
        sampler_logprobs_T=sampler if recorded else None,
    )
    return inputs, student, teacher


def log_p(logits_V, token, temperature):
    return logits_V[token] / temperature - torch.logsumexp(logits_V / temperature, 0)


def sequences():
    """(tokens, is the student's) of each sequence."""
    ends = list(itertools.accumulate(LENGTHS))
    return [(range(end - length, end), own) for end, length, own in zip(ends, LENGTHS, ON_POLICY, strict=True)]


def naive_earned(rewards, tokens, *, gamma, length_normalize, skip):
    """What each token earns, by the definition: a sum over the rest of its sequence."""
    found = {}
    for t in tokens:
        later = [u for u in tokens if u >= t + skip and u != MASKED]
        total = sum(gamma ** (u - t) * rewards[u] for u in later)
        found[t] = total / max(len(later), 1) if length_normalize else total
    return found


def naive_ratio(inputs, student, t):
    if inputs.sampler_logprobs_T is None:
        return 1.0
    return math.exp(log_p(student[t].detach(), inputs.response_ids_T[t], 1.0) - inputs.sampler_logprobs_T[t])


def naive_rewards(inputs, student, teacher, temperature):
    ids = inputs.response_ids_T
    return [
        (log_p(teacher[t], ids[t], temperature) - log_p(student[t].detach(), ids[t], temperature)).item()
        for t in range(TOKENS)
    ]


def check_against(expected, objective, inputs, student):
    """Every counted token's loss and gradient, `expected` being token -> (value, gradient [V])."""
    output = objective(inputs)
    assert output.mask_T.nonzero().flatten().tolist() == sorted(expected)
    for t, (value, gradient_V) in expected.items():
        assert output.loss_T[t].item() == pytest.approx(value, rel=1e-9, abs=1e-12)
        (found,) = torch.autograd.grad(output.loss_T[t], student, retain_graph=True)
        torch.testing.assert_close(found[t], gradient_V, rtol=1e-8, atol=1e-12)
        assert found.abs().sum() == pytest.approx(found[t].abs().sum().item())
    return output


def score(student, t, token, temperature):
    """Gradient of log p(token) in the logits [V], by hand."""
    probabilities = (student[t].detach() / temperature).softmax(-1)
    return (torch.nn.functional.one_hot(token, ROWS) - probabilities) / temperature


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(
    ("gamma", "length_normalize", "ratio_clip"),
    [(0.0, False, None), (0.0, True, 1.2), (0.7, False, 1.2), (0.7, True, 2.0), (1.0, True, None), (1.0, False, 1.0)],
)
def test_sampled_kl_is_what_its_definition_says(gamma, length_normalize, ratio_clip, temperature, recorded):
    inputs, student, teacher = problem(recorded=recorded)
    rewards, ids = naive_rewards(inputs, student, teacher, temperature), inputs.response_ids_T
    expected = {}
    for tokens, own in sequences():
        earned = naive_earned(rewards, tokens, gamma=gamma, length_normalize=length_normalize, skip=0)
        for t in tokens if own else []:
            if t != MASKED:
                weight = min(naive_ratio(inputs, student, t), ratio_clip or math.inf)
                value = -weight * earned[t]
                expected[t] = value, value * score(student, t, ids[t], temperature)
    objective = sampled_kl(
        temperature=temperature, gamma=gamma, length_normalize=length_normalize, ratio_clip=ratio_clip
    )
    check_against(expected, objective, inputs, student)


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("single_step", [True, False])
@pytest.mark.parametrize(
    ("gamma", "length_normalize", "clip_range", "temperature"),
    [(0.95, True, 0.2, 1.0), (1.0, False, None, 2.0), (0.5, False, 0.3, 1.0), (0.0, True, 0.2, 1.0)],
)
def test_minillm_is_what_its_definition_says(gamma, length_normalize, clip_range, temperature, single_step, recorded):
    inputs, student, teacher = problem(recorded=recorded)
    rewards, ids = naive_rewards(inputs, student, teacher, temperature), inputs.response_ids_T
    expected = {}
    for tokens, own in sequences():
        skip = 1 if single_step else 0
        earned = naive_earned(rewards, tokens, gamma=gamma, length_normalize=length_normalize, skip=skip)
        for t in tokens if own else []:
            if t == MASKED:
                continue
            ratio, advantage = naive_ratio(inputs, student, t), earned[t]
            low, high = (1 - clip_range, 1 + clip_range) if clip_range else (0, math.inf)
            value = max(-advantage * ratio, -advantage * min(max(ratio, low), high))
            stopped = (ratio > high and advantage > 0) or (ratio < low and advantage < 0)
            gradient = torch.zeros(ROWS) if stopped else -advantage * ratio * score(student, t, ids[t], temperature)
            if single_step:
                p, q = (x[t].detach().div(temperature).softmax(-1) for x in (teacher, student))
                kl = (q * (q / p).log()).sum()
                value, gradient = value + kl.item(), gradient + q * ((q / p).log() - kl) / temperature
            expected[t] = value, gradient.double()
    objective = minillm(
        temperature=temperature,
        gamma=gamma,
        length_normalize=length_normalize,
        single_step=single_step,
        clip_range=clip_range,
    )
    output = check_against(expected, objective, inputs, student)
    if clip_range and recorded and gamma:
        assert output.partial_metrics_T["clip_fraction"][0][output.mask_T].sum() > 0


STEPS, BRANCHES = 3, 3


class Tree:
    """All responses of 3 tokens over 3 rows, and policies with free logits at every prefix."""

    def __init__(self):
        random = torch.Generator().manual_seed(5)
        self.responses = list(itertools.product(range(BRANCHES), repeat=STEPS))
        prefixes = [p for n in range(STEPS) for p in itertools.product(range(BRANCHES), repeat=n)]
        self.row = {prefix: i for i, prefix in enumerate(prefixes)}
        self.student, self.teacher, self.old = (
            torch.randn(len(prefixes), BRANCHES, generator=random, dtype=torch.float64) for _ in range(3)
        )
        self.student.requires_grad_()

    def logprob(self, logits, response):
        steps = (logits[self.row[response[:n]]].log_softmax(-1)[response[n]] for n in range(STEPS))
        return sum(steps)

    def expected_gradient(self, objective, *, sampled_from=None):
        """Of the summed loss of a response, over all responses."""
        rows = torch.tensor([self.row[response[:n]] for response in self.responses for n in range(STEPS)])
        ids = torch.tensor([token for response in self.responses for token in response])
        behaviour = self.student.detach() if sampled_from is None else sampled_from
        recorded = behaviour[rows].log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        inputs = objective_inputs(
            self.student[rows],
            self.teacher[rows],
            ids,
            lengths=(STEPS,) * len(self.responses),
            on_policy_N=torch.ones(len(self.responses), dtype=torch.bool),
            sampler_logprobs_T=recorded,
        )
        chances = recorded.reshape(-1, STEPS).sum(-1).exp()
        assert chances.sum().item() == pytest.approx(1)
        loss = (objective(inputs).loss_T.reshape(-1, STEPS).sum(-1) * chances).sum()
        return torch.autograd.grad(loss, self.student)[0]

    def gradient_of_response_kl(self):
        kl = sum(
            self.logprob(self.student, y).exp() * (self.logprob(self.student, y) - self.logprob(self.teacher, y))
            for y in self.responses
        )
        return torch.autograd.grad(kl, self.student)[0]

    def gradient_at_given_prefixes(self):
        total = 0
        for prefix, row in self.row.items():
            chance = math.prod(
                self.student[self.row[prefix[:n]]].softmax(-1)[token].item() for n, token in enumerate(prefix)
            )
            q, p = self.student[row].log_softmax(-1), self.teacher[row].log_softmax(-1)
            total = total + chance * (q.exp() * (q - p)).sum()
        return torch.autograd.grad(total, self.student)[0]


@pytest.mark.parametrize(
    "objective",
    [sampled_kl(gamma=1.0, ratio_clip=2.0), minillm(), minillm(single_step=False), minillm(clip_range=0.2)],
    ids=["sampled_kl", "minillm", "without single step", "clipped"],
)
def test_with_all_that_comes_after_the_expected_gradient_is_that_of_the_kl_between_responses(objective):
    tree = Tree()
    expected = tree.gradient_of_response_kl()
    torch.testing.assert_close(tree.expected_gradient(objective), expected, rtol=1e-9, atol=1e-12)
    assert (expected - tree.gradient_at_given_prefixes()).abs().max() > 0.01


@pytest.mark.parametrize("objective", [sampled_kl(), minillm(gamma=0.0)], ids=["sampled_kl", "minillm"])
def test_a_token_alone_has_the_gradient_of_the_kl_at_given_prefixes(objective):
    tree = Tree()
    torch.testing.assert_close(
        tree.expected_gradient(objective), tree.gradient_at_given_prefixes(), rtol=1e-9, atol=1e-12
    )


def test_the_single_step_decomposition_has_less_variance():
    tree, norms = Tree(), {}
    for single_step in (True, False):
        squares = 0.0
        objective = minillm(single_step=single_step)
        for response in tree.responses:
            rows = torch.tensor([tree.row[response[:n]] for n in range(STEPS)])
            inputs = objective_inputs(tree.student[rows], tree.teacher[rows], list(response))
            (gradient,) = torch.autograd.grad(objective(inputs).loss_T.sum(), tree.student)
            squares += tree.logprob(tree.student, response).exp().item() * gradient.square().sum().item()
        norms[single_step] = squares
    assert norms[True] < norms[False]


def test_ratios_correct_for_samples_of_an_older_student_at_every_prefix():
    """One token a response: there the ratio is the whole weight, and the correction exact."""
    random = torch.Generator().manual_seed(3)
    student, teacher, old = (torch.randn(1, ROWS, generator=random, dtype=torch.float64) for _ in range(3))
    student.requires_grad_()
    ids = torch.arange(ROWS)
    recorded = old.log_softmax(-1)[0]

    def expected_gradient(objective, sampler):
        inputs = objective_inputs(
            student.expand(ROWS, -1),
            teacher.expand(ROWS, -1),
            ids,
            lengths=(1,) * ROWS,
            on_policy_N=torch.ones(ROWS, dtype=torch.bool),
            sampler_logprobs_T=sampler,
        )
        return torch.autograd.grad((objective(inputs).loss_T * recorded.exp()).sum(), student)[0]

    q, p = student.log_softmax(-1), teacher.log_softmax(-1)
    (exact,) = torch.autograd.grad((q.exp() * (q - p)).sum(), student)
    torch.testing.assert_close(expected_gradient(sampled_kl(), recorded), exact)
    assert (expected_gradient(sampled_kl(), None) - exact).abs().max() > 0.05
    biased = (expected_gradient(sampled_kl(ratio_clip=1.0), recorded) - exact).abs().max()
    assert biased > 0.01


def test_the_mean_loss_of_sampled_kl_estimates_the_reverse_kl():
    tree = Tree()
    ids = torch.arange(BRANCHES)
    inputs = objective_inputs(
        tree.student[:1].expand(BRANCHES, -1),
        tree.teacher[:1].expand(BRANCHES, -1),
        ids,
        lengths=(1,) * BRANCHES,
        on_policy_N=torch.ones(BRANCHES, dtype=torch.bool),
    )
    q, p = tree.student[0].detach().softmax(-1), tree.teacher[0].softmax(-1)
    output = sampled_kl()(inputs)
    kl = (q * (q / p).log()).sum()
    torch.testing.assert_close((output.loss_T.detach() * q).sum(), kl)
    for name in ("reverse_kl", "reverse_kl_k3"):
        torch.testing.assert_close((output.partial_metrics_T[name][0] * q).sum(), kl)
    assert (output.partial_metrics_T["reverse_kl_k3"][0] >= 0).all()
    assert (output.partial_metrics_T["reverse_kl"][0] < 0).any()


@pytest.mark.parametrize("objective", [sampled_kl(gamma=0.9), minillm(gamma=0.9)], ids=["sampled_kl", "minillm"])
def test_the_datasets_text_has_no_part_however_impossible_it_is(objective):
    inputs, student, teacher = problem()
    reference = objective(inputs)
    dataset = next(tokens for tokens, own in sequences() if not own)
    with torch.no_grad():
        for t in dataset:
            student[t, inputs.response_ids_T[t]] = -torch.inf
            teacher[t, inputs.response_ids_T[t]] = -torch.inf
    output = objective(inputs)
    weights = torch.full((TOKENS,), 1 / TOKENS)
    loss = weighted_sum(output.loss_T, weights, output.mask_T)
    assert loss.item() == pytest.approx(weighted_sum(reference.loss_T, weights, reference.mask_T).item())
    (gradient,) = torch.autograd.grad(loss, student)
    if isinstance(objective, SampledKl):  # the divergence's own gradient meets infinities there, as in every objective
        assert gradient.isfinite().all()
    assert gradient[: dataset.start].abs().sum() > 0


def test_metrics_are_means_over_the_students_tokens():
    inputs, student, teacher = problem()
    output = sampled_kl(ratio_clip=1.2)(inputs)
    weights = torch.full((TOKENS,), 1 / (TOKENS - 1))
    found = metric_means(metric_sums(output.metrics_T, output.partial_metrics_T, weights, output.mask_T))
    rewards = naive_rewards(inputs, student, teacher, 1.0)
    own = [t for tokens, is_own in sequences() for t in tokens if is_own and t != MASKED]
    ratios = [naive_ratio(inputs, student, t) for t in own]
    expected = {
        "reverse_kl": [-rewards[t] for t in own],
        "reverse_kl_k3": [math.exp(rewards[t]) - 1 - rewards[t] for t in own],
        "ratio": ratios,
        "ratio_deviation": [abs(ratio - 1) for ratio in ratios],
        "clip_fraction": [float(ratio > 1.2) for ratio in ratios],
    }
    assert found == pytest.approx({name: sum(values) / len(own) for name, values in expected.items()}, rel=1e-5)
    assert 0 < found["clip_fraction"] < 1


def test_without_recorded_logprobs_metrics_have_the_same_names():
    recorded, unrecorded = (sampled_kl()(problem(recorded=flag)[0]).partial_metrics_T for flag in (True, False))
    assert recorded.keys() == unrecorded.keys()
    assert (unrecorded["ratio"][0] == 1).all()


@pytest.mark.parametrize("chunk", [1, 5])
@pytest.mark.parametrize(
    "objective",
    [sampled_kl(gamma=0.9, temperature=2.0), minillm(gamma=0.9), MonteCarloKl(temperature=1.0, num_draws=3)],
    ids=["sampled_kl", "minillm", "monte_carlo"],
)
def test_chunks_change_nothing(objective, chunk, monkeypatch):
    def loss_and_gradient():
        inputs, student, _ = problem()
        torch.manual_seed(0)
        loss_T = objective(inputs).loss_T
        return loss_T.detach(), torch.autograd.grad((loss_T * torch.linspace(1, 2, TOKENS)).sum(), student)[0]

    whole = loss_and_gradient()
    monkeypatch.setattr(logits_module, "_DIRECT", 0)
    monkeypatch.setattr(logits_module, "CHUNK_TOKENS", {"cpu": chunk})
    for found, expected in zip(loss_and_gradient(), whole, strict=True):
        torch.testing.assert_close(found, expected)


def test_the_teachers_logprobs_of_the_sampled_tokens_are_enough():
    inputs, _, teacher = problem()
    ids = inputs.response_ids_T[:, None]
    sent = SampledLogprobs((teacher / 2).log_softmax(-1).gather(-1, ids)[:, 0].float().numpy(), 2.0)
    sparse = replace(inputs, teacher=SampledView([sent], torch.device("cpu")))
    objective = sampled_kl(temperature=2.0, gamma=0.5)
    torch.testing.assert_close(objective(sparse).loss_T, objective(inputs).loss_T, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="was made at 2"):
        sampled_kl(temperature=1.0)(sparse)
    with pytest.raises(ValueError, match="no teacher signal"):
        sampled_kl()(replace(inputs, teacher=None))
