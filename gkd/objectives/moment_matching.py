"""Adversarial moment matching (AMMD, arXiv 2406.02959): critics see the distance, the student makes it smaller.

min over the student of beta max_f1 d_off(f1) + (1 - beta) max_f2 d_on(f2), beta being `off_policy_weight`. d_off is
the sum of moment gaps (`gkd.objectives.moments`) at the states of the dataset's or teacher's text, d_on at those of the
student's own samples. What the paper's text leaves open (which side beta weighs, what the critics read, how they are
bounded) is decided here; no official code exists. Legend: T response tokens, t of a chunk, V rows, H hidden width.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import torch

from gkd.objectives.base import Adversary, Chunk, ObjectiveInputs, ObjectiveOutput, Staleness
from gkd.objectives.critics import Critic, CriticSettings
from gkd.objectives.moments import centred, later_gaps, moment_gap, with_future
from gkd.seeds import derive_seed
from gkd.signals import WHOLE_DISTRIBUTION, SignalKind

Trunk = Literal["teacher", "own", "student"]
"""Whose last hidden states the critics read. `teacher`: the teacher's, both. `own`: each those of the policy whose
action value it approximates, the student's off-policy and the teacher's on-policy. `student`: the student's, both."""
_OFF, _ON = "off", "on"
_READ_TEACHER: dict[Trunk, frozenset[str]] = {
    "teacher": frozenset({_OFF, _ON}),
    "own": frozenset({_ON}),
    "student": frozenset(),
}
"""Which sides' critics do. A linear critic on the student's own last hidden states h sees E[(p_T - p_S) h'] alone, and
that is what maximum likelihood has brought to 0 (the gradient of the head): it learns noise there, and the student
follows."""


class Gaps(NamedTuple):
    """What a critic and the policies say of every token."""

    gap_T: torch.Tensor
    """Moment gap of the critic of the token's source; 0 where it has none."""
    logprobs_T: torch.Tensor
    """Of the response's tokens under the student."""
    variation_T: torch.Tensor
    """Total variation between teacher and student, detached."""


class MomentCritics:
    """f_off for the dataset's text, f_on for the student's; they maximise the gaps.

    Where the weight of a side is 0 it has no critic.
    """

    def __init__(
        self,
        settings: CriticSettings,
        *,
        off_policy_weight: float,
        trunk: Trunk,
        temperature: float,
        inner_steps: int,
        warmup_inner_steps: int,
        warmup_steps: int,
        learning_rate_multiplier: float,
        weight_decay: float,
        grad_clip: float,
    ) -> None:
        """The config's values; `warmup_steps` steps of the student have `warmup_inner_steps` of the critics."""
        self.learning_rate_multiplier = learning_rate_multiplier
        self.weight_decay = weight_decay
        self.grad_clip = grad_clip
        self.weights = {_OFF: off_policy_weight, _ON: 1 - off_policy_weight}
        self._read_teacher = frozenset(side for side in _READ_TEACHER[trunk] if self.weights[side] > 0)
        self.reads_teacher = bool(self._read_teacher)
        self.baseline = 0.0
        """Mean sum of later gaps of the batch before: it does not depend on the samples that it is taken from."""
        self._settings = settings
        self._temperature = temperature
        self._inner_steps, self._warmup_inner_steps = inner_steps, warmup_inner_steps
        self._warmup_steps = warmup_steps
        self._next_baseline = 0.0
        self._critics: dict[str, Critic] = {}

    def gaps(self, inputs: ObjectiveInputs, *, critics_learn: bool) -> Gaps:
        """The moment gaps of a micro-batch; the critics, or else the student, have the graph."""
        assert self._critics, "critics learn before the student does"
        on_T = inputs.on_policy_T
        return Gaps(*inputs.per_token(partial(self._of_chunk, inputs=inputs, on_T=on_T, critics_learn=critics_learn)))

    def prepare(self, inputs: ObjectiveInputs, *, seed: int) -> None:
        """Random critics of the widths that the models turn out to have."""
        if self._critics:
            return
        none = slice(0, 0)
        widths = {side: self._hidden(side, inputs, none).shape[-1] for side, weight in self.weights.items() if weight}
        generator = torch.Generator().manual_seed(derive_seed(seed, "critics"))
        self._make(widths, inputs.num_rows, generator, inputs.student.device)

    def parameters(self) -> list[torch.nn.Parameter]:
        """Of both critics."""
        return [parameter for critic in self._critics.values() for parameter in critic.parameters()]

    def loss(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        """Minus the weighted gaps."""
        gaps, on_T = self.gaps(inputs, critics_learn=True), inputs.on_policy_T
        counted_T = inputs.mask_T & on_T
        future_T = later_gaps(gaps.gap_T, counted_T, inputs.lengths)
        return ObjectiveOutput(
            loss_T=-self.weighted(gaps.gap_T, on_T),
            mask_T=inputs.mask_T,
            partial_metrics_T={"future": (future_T, counted_T)},
        )

    def weighted(self, values_T: torch.Tensor, on_T: torch.Tensor) -> torch.Tensor:
        """[T] values times the weight of their token's side."""
        return values_T * torch.where(on_T, self.weights[_ON], self.weights[_OFF])

    def has(self, side: str) -> bool:
        """Whether there is a critic for the tokens of that side."""
        return self.weights[side] > 0

    def inner_steps(self, step: int) -> int:
        """More at the start, where the critics know nothing."""
        return self._warmup_inner_steps if step <= self._warmup_steps else self._inner_steps

    def end_step(self, metrics: Mapping[str, float]) -> None:
        """The student's step takes the baseline of the batch before; this batch's is for the next."""
        self.baseline, self._next_baseline = self._next_baseline, metrics.get("future", self._next_baseline)

    def state_dict(self) -> dict[str, Any]:
        """Weights, their sizes and the baseline."""
        return {
            "widths": {side: critic.width for side, critic in self._critics.items()},
            "rows": next((critic.rows for critic in self._critics.values()), 0),
            "critics": {side: critic.state_dict() for side, critic in self._critics.items()},
            "next_baseline": self._next_baseline,
        }

    def load_state_dict(self, state: Mapping[str, Any], *, device: torch.device) -> None:
        """Critics as they were.

        Raises:
            RuntimeError: if they were of other sizes than these settings make.
        """
        self._critics = {}
        self._make(state["widths"], state["rows"], torch.Generator(), device)
        for side, critic in self._critics.items():
            critic.load_state_dict(state["critics"][side])
        self._next_baseline = state["next_baseline"]

    def _make(self, widths: Mapping[str, int], rows: int, generator: torch.Generator, device: torch.device) -> None:
        for side, width in widths.items():
            self._critics[side] = Critic(width, rows, self._settings, generator=generator).to(device)

    def _of_chunk(
        self, chunk: Chunk, *, inputs: ObjectiveInputs, on_T: torch.Tensor, critics_learn: bool
    ) -> tuple[torch.Tensor, ...]:
        student_tV, teacher_tV = chunk.pair(self._temperature)
        log_student_tV = student_tV.log_softmax(-1)
        student_tV, teacher_tV = log_student_tV.exp(), teacher_tV.softmax(-1)
        with torch.set_grad_enabled(critics_learn):
            values_tV = centred(self._values(inputs, chunk.span, on_T[chunk.span]), teacher_tV, student_tV)
        return (
            moment_gap(values_tV, teacher_tV, student_tV),
            log_student_tV.gather(-1, chunk.ids_t.unsqueeze(-1)).squeeze(-1),
            (teacher_tV - student_tV.detach()).abs().sum(-1) / 2,
        )

    def _values(self, inputs: ObjectiveInputs, span: slice, on_t: torch.Tensor) -> torch.Tensor:
        """[t, V] of the critic of each token's side; 0 where there is none."""
        values_tV = torch.zeros(len(on_t), inputs.num_rows, device=on_t.device)
        for side, critic in self._critics.items():
            own_t = on_t if side == _ON else ~on_t
            if own_t.any():  # most chunks are of one side alone
                values_tV = values_tV.index_put((own_t,), critic(self._hidden(side, inputs, span)[own_t]))
        return values_tV

    def _hidden(self, side: str, inputs: ObjectiveInputs, span: slice) -> torch.Tensor:
        """[t, H] what the critic of a side reads, without a graph."""
        if side in self._read_teacher:
            if inputs.teacher is None:
                raise ValueError("moment matching compares with a teacher, and there is no teacher signal")
            return inputs.teacher.hidden(span).detach()
        if inputs.student_hidden_TH is None:
            raise ValueError(
                "moment matching reads the student's last hidden states, and this architecture's head cannot be "
                "applied to them on its own: use the distill objective"
            )
        return inputs.student_hidden_TH[span].detach()


class MomentMatching:
    """The weighted moment gap of every token, as the critics see it.

    A token of the dataset's text counts with the off-policy weight, one of the student's own with the rest, and the
    reducer takes the mean over all of them. With a share lambda of on-policy samples the two distances so weigh
    (1 - lambda) beta and lambda (1 - beta), whether the share is drawn per sample (both are in every batch) or per step
    (they alternate). Both distances are means per token, that is, sums over a response divided by its length.

    Gradients. Off-policy: exact. On-policy: exact for the states as they are, and with `future_credit: mc` also for how
    the student's tokens change the later states. That part takes the response for a sample of the student at the loss
    temperature, so it is exact where the rollout's temperature is the same, `top_p` is 1 and the weights are current.
    """

    needs_sampler_logprobs = False

    def __init__(self, critics: MomentCritics, *, future_credit: Literal["none", "mc"]) -> None:
        self.requires = frozenset({SignalKind.HIDDEN_STATES}) if critics.reads_teacher else WHOLE_DISTRIBUTION
        self.adversaries: tuple[Adversary, ...] = (critics,)
        self._critics = critics
        self.staleness: Staleness = "sensitive" if future_credit == "mc" else "robust"
        self._future_credit = future_credit

    def __call__(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        """The weighted gap per token [T], in units of the critics' values.

        Raises:
            ValueError: if there is no teacher signal, or the models do not give the hidden states that critics read.
        """
        critics = self._critics
        gaps, on_T = critics.gaps(inputs, critics_learn=False), inputs.on_policy_T
        loss_T = gaps.gap_T
        if self._future_credit == "mc":
            counted_T = inputs.mask_T & on_T
            future_T = later_gaps(loss_T, counted_T, inputs.lengths)
            loss_T = torch.where(
                counted_T, with_future(loss_T, gaps.logprobs_T, future_T, baseline=critics.baseline), loss_T
            )
        sides = {_OFF: inputs.mask_T & ~on_T, _ON: inputs.mask_T & on_T}
        measured = {f"tv_{side}": (gaps.variation_T, own_T) for side, own_T in sides.items()}
        measured |= {f"d_{side}": (gaps.gap_T.detach(), own_T) for side, own_T in sides.items() if critics.has(side)}
        return ObjectiveOutput(loss_T=critics.weighted(loss_T, on_T), mask_T=inputs.mask_T, partial_metrics_T=measured)
