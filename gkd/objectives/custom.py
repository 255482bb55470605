"""Objectives and token weights of the user's own, found by their import path and tried out before a run.

Legend: T response tokens, V rows.
"""

from typing import Any, get_args

import numpy as np
import torch

from gkd.errors import UserError
from gkd.importing import load_object
from gkd.logits import HeadLogits
from gkd.objectives.base import Objective, ObjectiveInputs, ObjectiveOutput, Staleness
from gkd.objectives.token_weights import Custom
from gkd.reduce import weighted_sum
from gkd.signals import FullLogits, HiddenStates, SampledLogprobs, SignalKind, TeacherSignal, TopK
from gkd.teacher_view import view_of

_ROWS, _WIDTH = 6, 4
_LENGTHS = (3, 2)


class CustomObjective:
    """A user's objective, with what it leaves out filled in: `staleness` (sensitive), `needs_sampler_logprobs` (False)
    and `adversaries` (none)."""

    def __init__(self, objective: Any, requires: frozenset[SignalKind]) -> None:
        self.requires = requires
        self.staleness: Staleness = getattr(objective, "staleness", "sensitive")
        self.needs_sampler_logprobs = bool(getattr(objective, "needs_sampler_logprobs", False))
        self.needs_reward = bool(getattr(objective, "needs_reward", False))
        self.adversaries = tuple(getattr(objective, "adversaries", ()))
        self._objective = objective

    def __call__(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        """The user's loss per token [T]."""
        return self._objective(inputs)


def load_objective(path: str, kwargs: dict[str, Any], *, temperature: float, field: str) -> Objective:
    """The objective that calling what `path` names with (temperature=temperature, **kwargs) gives.

    Temperature and options are the config's, and one place says each: teachers that send a sparse signal make it at
    `objective.temperature`, so an objective must not have another.

    Args:
        path: import path of a class, or of a function that returns an objective.
        kwargs: its other arguments.
        temperature: of the loss.
        field: the config field of the objective, for messages.

    Raises:
        UserError: if it cannot be imported or called, or does not do what an objective does with any signal that it
            says it can use.
    """
    make = load_object(path, field=f"{field}.path")
    try:
        made = make(temperature=temperature, **kwargs)
    except Exception as error:  # the user's own code may fail in any way
        raise UserError(
            f"{field}.path",
            path,
            f"fails when called with temperature={temperature:g} and {kwargs}: {_reason(error)}.",
            "It must take (*, temperature, **kwargs) and return the objective.",
        ) from error
    requires = _requires(made, path, field)
    staleness = getattr(made, "staleness", "sensitive")
    if not callable(made) or staleness not in get_args(Staleness):
        raise UserError(
            f"{field}.path",
            path,
            f"has staleness = {staleness!r}." if callable(made) else "cannot be called.",
            f"Define __call__(inputs: ObjectiveInputs) -> ObjectiveOutput; staleness is one of "
            f"{', '.join(get_args(Staleness))}.",
        )
    # Where adversaries learn first there is nothing to try out before they have.
    if not getattr(made, "adversaries", ()):
        for inputs in _examples(requires, temperature):
            problem = _problem_of_output(made, inputs)
            if problem is not None:
                raise UserError(
                    f"{field}.path",
                    path,
                    f"{problem}, for {len(inputs.mask_T)} tokens.",
                    "Return ObjectiveOutput(loss_T=one loss per token, with a graph; mask_T=a part of inputs.mask_T).",
                )
    return CustomObjective(made, requires)


def load_token_weight(path: str, kwargs: dict[str, Any], *, temperature: float, field: str) -> Custom:
    """The function that `path` names, with its options bound.

    Args:
        path: import path of a function of (ObjectiveInputs, **kwargs).
        kwargs: its options.
        temperature: of the loss, at which sparse signals are made.
        field: the config field of the token weight, for messages.

    Raises:
        UserError: if it cannot be imported, or does not return one finite number per token.
    """
    function = load_object(path, field=f"{field}.path")
    weight = Custom(function, kwargs, requires=_requires(function, path, field, default=()))
    for inputs in _examples(weight.requires, temperature):
        problem = _problem_of_weights(weight, inputs)
        if problem is not None:
            raise UserError(
                f"{field}.path",
                path,
                f"{problem}, for {len(inputs.mask_T)} tokens and {kwargs}.",
                "It must take (inputs: ObjectiveInputs, **kwargs) and return one finite weight per token.",
            )
    return weight


def _requires(made: Any, path: str, field: str, default: Any = None) -> frozenset[SignalKind]:
    try:
        return frozenset(SignalKind(kind) for kind in getattr(made, "requires", default))
    except (ValueError, TypeError):
        raise UserError(
            f"{field}.path",
            path,
            f"has requires = {getattr(made, 'requires', None)!r}.",
            f"Make it a set of signal kinds, empty if no teacher is needed: {', '.join(sorted(SignalKind))}.",
        ) from None


def _problem_of_output(objective: Any, inputs: ObjectiveInputs) -> str | None:
    num_tokens = len(inputs.mask_T)
    try:
        output = objective(inputs)
        if not isinstance(output, ObjectiveOutput):
            return f"returned {type(output).__name__} and no ObjectiveOutput"
        values = {"loss_T": output.loss_T} | output.metrics_T
        values |= {name: value for name, (value, _) in output.partial_metrics_T.items()}
        for name, value in values.items():
            if not isinstance(value, torch.Tensor) or value.shape != (num_tokens,) or not value.is_floating_point():
                return f"returned {_shown(value)} as {name} and no [T] of floats"
        if output.mask_T.dtype != torch.bool or output.mask_T.shape != (num_tokens,):
            return f"returned {_shown(output.mask_T)} as mask_T and no [T] of bools"
        if (output.mask_T & ~inputs.mask_T).any():
            return "counts tokens that the inputs' mask leaves out"
        if not output.loss_T.requires_grad:
            return "returned a loss_T that does not depend on the student (no graph)"
        loss = weighted_sum(output.loss_T, torch.ones(num_tokens), output.mask_T)
        if not loss.isfinite():
            return f"returned a loss that is {loss.item()}"
        loss.backward()
    except Exception as error:  # the user's own code may fail in any way
        return f"fails when called: {_reason(error)}"
    return None


def _problem_of_weights(weight: Custom, inputs: ObjectiveInputs) -> str | None:
    try:
        with torch.no_grad():
            weight_T = weight(inputs)
    except Exception as error:  # the user's own code may fail in any way
        return f"fails when called: {_reason(error)}"
    if not isinstance(weight_T, torch.Tensor) or weight_T.shape != inputs.mask_T.shape:
        return f"returned {_shown(weight_T)} and no [T]"
    return None if weight_T.isfinite().all() else "returned weights that are not finite"


def _shown(value: object) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(".")


def _examples(requires: frozenset[SignalKind], temperature: float) -> list[ObjectiveInputs]:
    """Two short sequences, one of the student's and one of the dataset's, with each signal that would do."""
    kinds: list[SignalKind | None] = [kind for kind in sorted(requires) if kind != SignalKind.ATTENTION_RELATIONS]
    return [_example(kind, temperature) for kind in (kinds if requires else [None])]


def _example(kind: SignalKind | None, temperature: float) -> ObjectiveInputs:
    num_tokens = sum(_LENGTHS)
    random = torch.Generator().manual_seed(0)  # the run's own random numbers are left alone
    hidden_TH = torch.randn(num_tokens, _WIDTH, generator=random).requires_grad_()
    head_HV = torch.randn(_WIDTH, _ROWS, generator=random)
    ids_T = torch.arange(num_tokens) % _ROWS
    signals = [] if kind is None else [_signal(kind, ids, temperature) for ids in ids_T.split(_LENGTHS)]
    heads = {"teacher": lambda hidden: hidden @ -head_HV}
    return ObjectiveInputs(
        student=HeadLogits(hidden_TH, lambda hidden: hidden @ head_HV, num_rows=_ROWS),
        num_rows=_ROWS,
        teacher=view_of(signals, heads, rows=_ROWS, device=torch.device("cpu")) if signals else None,
        response_ids_T=ids_T,
        mask_T=torch.arange(num_tokens) != 1,
        lengths=_LENGTHS,
        on_policy_N=torch.tensor([True, False]),
        student_hidden_TH=hidden_TH,
        sampler_logprobs_T=torch.linspace(-2, -1, num_tokens),
        rewards_N=torch.tensor([1.0, 0.0]),
        advantages_N=torch.tensor([0.5, 0.0]),
        sequence_scale_N=torch.tensor([1.0, 0.0]),
    )


def _signal(kind: SignalKind, ids_T: torch.Tensor, temperature: float) -> TeacherSignal:
    random = torch.Generator().manual_seed(1)
    logits_TV = torch.randn(len(ids_T), _ROWS, generator=random)
    log_p_TV = (logits_TV / temperature).log_softmax(-1)
    sampled_T = log_p_TV.gather(-1, ids_T.unsqueeze(-1)).squeeze(-1).numpy()
    match kind:
        case SignalKind.FULL_LOGITS:
            return FullLogits.from_tensor(logits_TV)
        case SignalKind.HIDDEN_STATES:
            return HiddenStates(torch.randn(len(ids_T), _WIDTH, generator=random).numpy())
        case SignalKind.SAMPLED_LOGPROBS:
            return SampledLogprobs(sampled_T, temperature)
        case _:
            others_TV = log_p_TV.scatter(-1, ids_T.unsqueeze(-1), -torch.inf)
            ids_T1 = ids_T.unsqueeze(-1).int().numpy()
            none_T1 = np.full_like(ids_T1, -1)  # as of a token that both chose
            return TopK(
                ids_TK=np.concatenate([none_T1, ids_T1], axis=-1),
                logprobs_TK=np.stack([np.full_like(sampled_T, -np.inf), sampled_T], axis=-1),
                tail_T=others_TV.logsumexp(-1).numpy(),
                sampled_T=sampled_T,
                temperature=temperature,
            )
