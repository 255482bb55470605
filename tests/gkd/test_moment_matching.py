"""Moment matching against an enumerated tree, finite differences and a float64 twin."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from batches import objective_inputs

from gkd import logits
from gkd.config.objective import MomentMatchingObjective
from gkd.logits import FrozenLogits, HeadLogits, WholeLogits
from gkd.objectives import build_objective
from gkd.objectives.base import adversaries_of
from gkd.objectives.critics import Critic, CriticSettings
from gkd.objectives.moments import centred, later_gaps, moment_gap, with_future
from gkd.reduce import metric_means, metric_sums
from gkd.signals import SignalKind
from gkd.teacher_view import WholeView

V, T = 3, 3
STATES = [s for t in range(T) for s in itertools.product(range(V), repeat=t)]
PLACE = {state: i for i, state in enumerate(STATES)}
SEQUENCES = list(itertools.product(range(V), repeat=T))


class Tree:
    """All texts of T tokens out of V: tabular policies and a random reward, everything by enumeration."""

    def __init__(self, seed=0):
        self.random = torch.Generator().manual_seed(seed)
        self.theta = self.table().requires_grad_()
        self.student = self.theta.softmax(-1)
        self.teacher = self.table().softmax(-1)
        self.reward = self.table()

    def table(self):
        return torch.randn(len(STATES), V, generator=self.random, dtype=torch.float64)

    def probability(self, policy, sequence):
        return math.prod(policy[PLACE[sequence[:t]], token] for t, token in enumerate(sequence))

    def gain(self, policy):
        """J: the expected sum of rewards."""
        return sum(
            self.probability(policy, s) * sum(self.reward[PLACE[s[:t]], s[t]] for t in range(T)) for s in SEQUENCES
        )

    def action_values(self, policy):
        """Q of a policy, from the last state backwards."""
        q = torch.zeros(len(STATES), V, dtype=torch.float64)
        for state in reversed(STATES):
            for token in range(V):
                later = (*state, token)
                rest = (policy[PLACE[later]] * q[PLACE[later]]).sum() if len(later) < T else 0.0
                q[PLACE[state], token] = self.reward[PLACE[state], token] + rest
        return q

    def distance(self, writer, f, theta):
        """E over the writer's texts of the sum of gaps; a writer of None is the student itself."""
        student = theta.softmax(-1)
        writer = student if writer is None else writer
        total = torch.zeros((), dtype=torch.float64)
        for s in SEQUENCES:
            gaps = [((self.teacher - student) * f)[PLACE[s[:t]]].sum() for t in range(T)]
            total = total + self.probability(writer, s) * sum(gaps)
        return total

    def numeric_gradient(self, function):
        """Central differences with respect to every entry of theta."""
        gradient, step = torch.zeros_like(self.theta), 1e-5
        for i in itertools.product(range(len(STATES)), range(V)):
            shift = torch.zeros_like(self.theta)
            shift[i] = step
            theta = self.theta.detach()
            gradient[i] = (function(theta + shift) - function(theta - shift)) / (2 * step)
        return gradient

    def visited(self, table, sequence):
        return torch.stack([table[PLACE[sequence[:t]]] for t in range(T)])

    def expected_gradient(self, writer, f, loss_of):
        """Expectation over the writer's texts of the gradient of a loss per token, summed."""
        total = torch.zeros(len(STATES), V, dtype=torch.float64)
        for s in SEQUENCES:
            student_TV = self.visited(self.theta, s).softmax(-1)
            gap_T = moment_gap(self.visited(f, s), self.visited(self.teacher, s), student_TV)
            logprobs_T = student_TV.log().gather(-1, torch.tensor(s).unsqueeze(-1)).squeeze(-1)
            (gradient,) = torch.autograd.grad(loss_of(gap_T, logprobs_T).sum(), self.theta)
            total += self.probability(writer, s).item() * gradient
        return total


@pytest.mark.parametrize("seed", range(3))
def test_the_gap_in_return_is_either_distance_with_its_action_value(seed):
    tree = Tree(seed)
    expected = tree.gain(tree.teacher) - tree.gain(tree.student)
    found = {"off": (tree.teacher, tree.student), "on": (tree.student, tree.teacher)}
    for writer, valued in found.values():
        f, total = tree.action_values(valued), 0.0
        for s in SEQUENCES:
            gap_T = moment_gap(*(tree.visited(x, s) for x in (f, tree.teacher, tree.student)))
            total += tree.probability(writer, s) * gap_T.sum()
        assert abs(total - expected) < 1e-12
    assert abs(expected) > 0.01


def test_the_gradient_of_the_off_policy_distance_is_exact():
    tree, f = Tree(), Tree(1).table()
    found = tree.expected_gradient(tree.teacher, f, lambda gap_T, _: gap_T)
    expected = tree.numeric_gradient(lambda theta: tree.distance(tree.teacher, f, theta))
    assert (found - expected).abs().max() < 1e-8
    assert expected.abs().max() > 0.01


@pytest.mark.parametrize("baseline", [0.0, 2.5])
def test_the_gradient_of_the_on_policy_distance_is_exact_with_future_credit(baseline):
    tree, f = Tree(), Tree(1).table()

    def loss(gap_T, logprobs_T):
        return with_future(
            gap_T, logprobs_T, later_gaps(gap_T, torch.ones(T, dtype=torch.bool), [T]), baseline=baseline
        )

    found = tree.expected_gradient(tree.student.detach(), f, loss)
    expected = tree.numeric_gradient(lambda theta: tree.distance(None, f, theta))
    assert (found - expected).abs().max() < 1e-8
    # Without it the states are taken as they are.
    frozen = tree.expected_gradient(tree.student.detach(), f, lambda gap_T, _: gap_T)
    expected_frozen = tree.numeric_gradient(lambda theta: tree.distance(tree.student.detach(), f, theta))
    assert (frozen - expected_frozen).abs().max() < 1e-8
    assert (expected - expected_frozen).abs().max() > 0.01


def test_future_credit_leaves_the_loss_the_distance():
    gap_T, logprobs_T = torch.randn(5), torch.randn(5)
    assert torch.equal(with_future(gap_T, logprobs_T, torch.randn(5), baseline=0.3), gap_T)


@pytest.mark.parametrize("bound", [0.5, 1.0])
def test_no_critic_within_the_bound_sees_more_than_twice_the_total_variation(bound):
    tree = Tree()
    variation = (tree.teacher - tree.student).abs().sum(-1) / 2
    for f in (tree.table().tanh() * bound, (tree.teacher - tree.student).sign() * bound):
        gap = moment_gap(f, tree.teacher, tree.student)
        assert (gap.abs() <= 2 * variation * bound + 1e-12).all()
    torch.testing.assert_close(gap, 2 * variation * bound)  # and the best one reaches it


def test_centring_changes_neither_the_gap_nor_its_gradients():
    tree = Tree()
    f = (tree.table() + 100).requires_grad_()
    results = []
    for values in (f, centred(f, tree.teacher, tree.student)):
        gap = moment_gap(values, tree.teacher, tree.student)
        results.append((gap.detach(), *torch.autograd.grad(gap.sum(), (f, tree.theta), retain_graph=True)))
    for plain, moved in zip(*results, strict=True):
        torch.testing.assert_close(plain, moved, rtol=1e-9, atol=1e-10)
    middle = (tree.teacher + tree.student) / 2
    assert (middle * centred(f, tree.teacher, tree.student)).sum(-1).abs().max() < 1e-10


def test_sums_of_later_gaps_stay_within_their_sequence_and_leave_out_what_does_not_count():
    gap_T = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0], requires_grad=True)
    counted_T = torch.ones(6, dtype=torch.bool)
    assert later_gaps(gap_T, counted_T, (3, 0, 1, 2)).tolist() == [6, 4, 0, 0, 32, 0]
    counted_T[1] = False
    found = later_gaps(gap_T, counted_T, (3, 0, 1, 2))
    assert found.tolist() == [4, 4, 0, 0, 32, 0] and not found.requires_grad
    assert later_gaps(gap_T[:0], counted_T[:0], (0, 0)).shape == (0,)


@pytest.mark.parametrize("rank", [None, 3])
def test_a_critic_is_a_bounded_linear_head(rank):
    critic = Critic(5, 7, CriticSettings(bound=2.0, rank=rank), generator=torch.Generator().manual_seed(0))
    assert critic(torch.randn(4, 5)).abs().max() < 0.05  # it starts at almost 0
    hidden = torch.randn(4, 5) * 3
    with torch.no_grad():
        critic.up_Vr.mul_(2000)
    weight = critic.up_Vr.double() if rank is None else critic.up_Vr.double() @ critic.down_rH.double() / rank**0.5
    expected = 2 * torch.tanh(hidden.double() @ weight.T / 5**0.5)
    torch.testing.assert_close(critic(hidden).double(), expected, rtol=1e-5, atol=1e-5)
    assert critic(hidden.bfloat16()).dtype == torch.float32
    assert critic(hidden * 1e4).abs().max() <= 2


WIDTH, OTHER_WIDTH, ROWS = 6, 5, 8
LENGTHS, ON_POLICY = (5, 3, 0, 6, 2), (True, False, True, True, False)
TOKENS = sum(LENGTHS)


def objective_of(**changes):
    """A built objective, its critics, and its config."""
    objective = build_objective(MomentMatchingObjective.model_validate({"type": "moment_matching"} | changes))
    (critics,) = adversaries_of(objective)
    return objective, critics


def problem(*, seed=0, masked=(2, 9)):
    """A micro-batch of both sides, its student's weights with a graph."""
    random = torch.Generator().manual_seed(seed)
    hidden, weight, teacher_hidden, teacher_weight = (
        torch.randn(*shape, generator=random)
        for shape in ((TOKENS, WIDTH), (ROWS, WIDTH), (TOKENS, OTHER_WIDTH), (ROWS, OTHER_WIDTH))
    )
    hidden.requires_grad_()
    mask = torch.ones(TOKENS, dtype=torch.bool)
    mask[list(masked)] = False
    return objective_inputs(
        torch.zeros(TOKENS, ROWS),
        ids=torch.randint(0, ROWS, (TOKENS,), generator=random),
        student=HeadLogits(hidden, lambda h: h @ weight.T, num_rows=ROWS),
        teacher=WholeView(HeadLogits(teacher_hidden, lambda h: h @ teacher_weight.T, num_rows=ROWS)),
        lengths=LENGTHS,
        on_policy_N=torch.tensor(ON_POLICY),
        mask_T=mask,
        student_hidden_TH=hidden,
    )


def strong(critics, inputs):
    """Critics whose values are not almost 0."""
    critics.prepare(inputs, seed=0)
    with torch.no_grad():
        for parameter in critics.parameters():
            parameter.div_(parameter.std())
    return critics.parameters()


def read_by(inputs, trunk):
    """Whether the token is the student's own -> the hidden states that its critic reads."""
    student, teacher = inputs.student_hidden_TH.detach(), inputs.teacher.hidden(slice(0, TOKENS))
    sides = {"own": (student, teacher), "teacher": (teacher, teacher), "student": (student, student)}[trunk]
    return dict(zip((False, True), sides, strict=True))


def twin(inputs, weights, reads, *, beta, temperature, future, baseline):
    """The student's surrogate loss of METHODS 2.3 and the weighted gaps, token by token in float64."""
    student = inputs.student.rows(slice(0, TOKENS)).double() / temperature
    teacher = inputs.teacher.logits.rows(slice(0, TOKENS)).double() / temperature
    losses, gaps, first = [], [], 0
    for length, on in zip(LENGTHS, ON_POLICY, strict=True):
        own = range(first, first + length)
        f = torch.tanh(reads[on].double() @ weights[on].detach().double().T / reads[on].shape[1] ** 0.5)
        gap = {t: sum((teacher[t].softmax(-1) - student[t].softmax(-1))[a] * f[t][a] for a in range(ROWS)) for t in own}
        for t in own:
            loss = -(student[t].softmax(-1) * f[t]).sum()
            if on and future and inputs.mask_T[t]:
                later = sum(gap[u].detach() for u in own if u > t and inputs.mask_T[u])
                loss = loss + student[t].log_softmax(-1)[inputs.response_ids_T[t]] * (later - baseline)
            losses.append((1 - beta if on else beta) * loss)
            gaps.append((1 - beta if on else beta) * gap[t])
        first += length
    return torch.stack(losses), torch.stack(gaps)


@pytest.mark.parametrize("trunk", ["teacher", "own", "student"])
@pytest.mark.parametrize("future", ["none", "mc"])
@pytest.mark.parametrize("chunk", [None, 4])
def test_the_students_loss_against_a_twin(trunk, future, chunk, monkeypatch):
    if chunk:
        monkeypatch.setattr(logits, "_DIRECT", 0)
        monkeypatch.setattr(logits, "CHUNK_TOKENS", {"cpu": chunk})
    inputs = problem()
    objective, critics = objective_of(off_policy_weight=0.3, temperature=1.7, future_credit=future, trunk=trunk)
    off, on = strong(critics, inputs)
    critics.baseline = 0.4
    output = objective(inputs)
    weights, reads = {False: off, True: on}, read_by(inputs, trunk)
    surrogate_T, gap_T = twin(inputs, weights, reads, beta=0.3, temperature=1.7, future=future == "mc", baseline=0.4)
    torch.testing.assert_close(output.loss_T.double(), gap_T, rtol=1e-4, atol=1e-6)
    weights_T = torch.linspace(0.5, 2.0, TOKENS) * inputs.mask_T
    hidden = inputs.student_hidden_TH
    (found,) = torch.autograd.grad((output.loss_T * weights_T).sum(), hidden)
    (expected,) = torch.autograd.grad((surrogate_T * weights_T).sum(), hidden)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in (off, on))


def test_the_students_loss_against_a_twin_with_critics_of_a_low_rank():
    inputs = problem()
    objective, critics = objective_of(off_policy_weight=0.3, critic={"rank": 3})
    strong(critics, inputs)
    parts = critics.state_dict()["critics"]
    off, on = (parts[side]["up_Vr"] @ parts[side]["down_rH"] / 3**0.5 for side in ("off", "on"))
    surrogate_T, gap_T = twin(
        inputs, {False: off, True: on}, read_by(inputs, "teacher"), beta=0.3, temperature=1.0, future=False, baseline=0
    )
    loss_T = objective(inputs).loss_T
    torch.testing.assert_close(loss_T.double(), gap_T, rtol=1e-4, atol=1e-6)
    found, expected = (
        torch.autograd.grad(each_T[inputs.mask_T].sum(), inputs.student_hidden_TH)[0]
        for each_T in (loss_T, surrogate_T)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("trunk", ["teacher", "own", "student"])
@pytest.mark.parametrize("chunk", [None, 4])
def test_the_critics_loss_against_a_twin(trunk, chunk, monkeypatch):
    if chunk:
        monkeypatch.setattr(logits, "_DIRECT", 0)
        monkeypatch.setattr(logits, "CHUNK_TOKENS", {"cpu": chunk})
    inputs = problem()
    _, critics = objective_of(off_policy_weight=0.3, trunk=trunk)
    off, on = strong(critics, inputs)
    hidden, reads = inputs.student_hidden_TH, read_by(inputs, trunk)
    inputs = replace(inputs, student=FrozenLogits(inputs.student))
    weights_T = torch.linspace(0.5, 2.0, TOKENS) * inputs.mask_T
    output = critics.loss(inputs)
    found = torch.autograd.grad((output.loss_T * weights_T).sum(), (off, on))

    student, teacher = (
        source.rows(slice(0, TOKENS)).double().softmax(-1).detach()
        for source in (inputs.student, inputs.teacher.logits)
    )
    on_T = torch.repeat_interleave(torch.tensor(ON_POLICY), torch.tensor(LENGTHS))
    for index, (weight, own_T, side) in enumerate([(off, ~on_T, 0.3), (on, on_T, 0.7)]):
        weight = weight.detach().double().requires_grad_()
        read = reads[bool(index)].double()
        f = torch.tanh(read @ weight.T / read.shape[1] ** 0.5)
        total = -((teacher - student) * f)[own_T].sum(-1) @ (weights_T[own_T].double() * side)
        (expected,) = torch.autograd.grad(total, weight)
        torch.testing.assert_close(found[index].double(), expected, rtol=1e-4, atol=1e-6)
    assert not output.loss_T[0].detach().isnan() and hidden.grad is None


def test_metrics_are_of_each_sides_tokens_alone():
    inputs = problem()
    objective, critics = objective_of()
    strong(critics, inputs)
    output = objective(inputs)
    weights_T = torch.full((TOKENS,), 1 / TOKENS)
    means = metric_means(metric_sums(output.metrics_T, output.partial_metrics_T, weights_T, output.mask_T))
    assert means.keys() == {"d_off", "d_on", "tv_off", "tv_on"}
    on_T = torch.repeat_interleave(torch.tensor(ON_POLICY), torch.tensor(LENGTHS))
    student, teacher = (
        source.rows(slice(0, TOKENS)).double().softmax(-1) for source in (inputs.student, inputs.teacher.logits)
    )
    for side, own_T in (("on", on_T & inputs.mask_T), ("off", ~on_T & inputs.mask_T)):
        assert means[f"tv_{side}"] == pytest.approx(((teacher - student).abs().sum(-1) / 2)[own_T].mean().item())
        assert means[f"d_{side}"] == pytest.approx(2 * output.loss_T[own_T].mean().item())
        assert abs(means[f"d_{side}"]) <= 2 * means[f"tv_{side}"]
    # A batch of one side has no metrics of the other.
    output = objective(replace(inputs, on_policy_N=torch.ones(len(LENGTHS), dtype=torch.bool)))
    means = metric_means(metric_sums(output.metrics_T, output.partial_metrics_T, weights_T, output.mask_T))
    assert means.keys() == {"d_on", "tv_on"}


@pytest.mark.parametrize(("weight", "side"), [(0.0, "on"), (1.0, "off")])
def test_at_the_ends_there_is_one_critic(weight, side):
    inputs = problem()
    objective, critics = objective_of(off_policy_weight=weight, trunk="own")
    (parameter,) = strong(critics, inputs)
    assert parameter.shape == (ROWS, OTHER_WIDTH if side == "on" else WIDTH)
    output = objective(inputs)
    on_T = torch.repeat_interleave(torch.tensor(ON_POLICY), torch.tensor(LENGTHS))
    silent_T = ~on_T if side == "on" else on_T
    assert (output.loss_T[silent_T] == 0).all() and (output.loss_T[~silent_T] != 0).all()
    assert {name for name in output.partial_metrics_T if name.startswith("d_")} == {f"d_{side}"}


def test_what_the_critics_read_says_which_signals_will_do():
    whole = {SignalKind.HIDDEN_STATES, SignalKind.FULL_LOGITS}
    for weight in (0.0, 0.5, 1.0):
        assert objective_of(off_policy_weight=weight)[0].requires == {SignalKind.HIDDEN_STATES}
        assert objective_of(off_policy_weight=weight, trunk="student")[0].requires == whole
        own = objective_of(off_policy_weight=weight, trunk="own")[0].requires
        assert own == (whole if weight == 1 else {SignalKind.HIDDEN_STATES})
    inputs = problem()
    full = replace(inputs, teacher=WholeView(WholeLogits(inputs.teacher.logits.rows(slice(0, TOKENS)))))
    objective, critics = objective_of(trunk="student")
    strong(critics, full)
    assert objective(full).loss_T.shape == (TOKENS,)
    with pytest.raises(ValueError, match="hidden states"):
        objective_of()[1].prepare(full, seed=0)
    with pytest.raises(ValueError, match="distill"):
        objective_of(trunk="student")[1].prepare(replace(full, student_hidden_TH=None), seed=0)


def test_critics_learn_more_often_at_the_start():
    _, critics = objective_of(inner_steps=2, warmup_inner_steps=7, warmup_steps=3)
    assert [critics.inner_steps(step) for step in (1, 3, 4)] == [7, 7, 2]


def test_the_baseline_is_the_mean_of_the_batch_before():
    _, critics = objective_of()
    seen = []
    for metrics in ({"future": 1.0}, {"future": 2.0}, {}, {"future": 4.0}):
        critics.end_step(metrics)
        seen.append(critics.baseline)
    assert seen == [0.0, 1.0, 2.0, 2.0]
