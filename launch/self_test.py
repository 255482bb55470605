"""The teacher-equals-student self-test: where both are one model, a distillation loss and its gradient are 0.

A small copy of the student's architecture with random weights goes the way of a real batch: packed, through the
student's forward pass, into the real objective. What comes out is known beforehand, so that a divergence of the user's
own that is none, or an architecture that cannot be trained here, shows before a worker starts.
"""

from typing import Any

import torch

from gkd.config.divergence import DivergenceConfig
from gkd.config.objective import BuiltObjective, DistillObjective, RlGkdObjective, SeqKdObjective, SumObjective
from gkd.errors import UserError
from gkd.logits import WholeLogits
from gkd.objectives import ObjectiveInputs, build_objective
from gkd.packing import pack
from gkd.reduce import sequence_token_weights, weighted_sum
from gkd.response_forward import ResponseForward
from gkd.teacher_view import WholeView
from launch.small_copy import small_copy

_TOLERANCE = 1e-5
"""Largest loss in nats, and largest gradient with respect to a logit, that rounding explains."""
_LENGTHS = ((3, 6), (1, 2), (5, 4), (2, 1))
"""(prompt tokens, response tokens) of the sequences; some of them fit into one row together."""


def self_test(path: str, objective: BuiltObjective, *, field: str) -> str | None:
    """Run the test.

    Args:
        path: folder or hub name of the student.
        objective: the run's; without a teacher in it only the architecture is tested.
        field: the config field that named the student, for messages.

    Returns:
        Why the test could not be made, if it could not; None if it passed.

    Raises:
        UserError: if the architecture is not supported, or if loss or gradient are not 0.
    """
    from transformers import AutoConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model = small_copy(AutoConfig.from_pretrained(path))
        except Exception as error:  # cutting a config down can break it in ways that only its own code knows
            return f"the self-test was left out: no small {path} can be made ({_reason(error)})"
        if not _is_causal(model):
            raise UserError(
                field,
                path,
                f"is a {type(model).__name__}, which sees the tokens that it is to predict.",
                "Use a causal language model.",
            )
        try:
            forward = ResponseForward(model)
        except (ValueError, RuntimeError) as error:  # the model alone was seen to run
            raise UserError(
                field, path, f"cannot be trained on packed responses: {_reason(error)}.", "Use another architecture."
            ) from None
        for at, measuring, divergence in _divergences(objective, "objective"):
            _check_zero(forward, measuring, divergence, field=at)
    return None


@torch.no_grad()
def _is_causal(model: Any) -> bool:
    """Whether a token changes nothing of what is predicted before it. Encoders (BERT) have language heads too."""
    rows = model.get_input_embeddings().num_embeddings
    ids_1S = torch.arange(6).unsqueeze(0) % rows
    changed_1S = ids_1S.clone()
    changed_1S[0, -1] = (ids_1S[0, -1] + 1) % rows
    before, after = (model(input_ids=ids, use_cache=False).logits[0, :-1] for ids in (ids_1S, changed_1S))
    return torch.allclose(before, after, atol=1e-4)


def _divergences(objective: BuiltObjective, field: str) -> list[tuple[str, BuiltObjective, DivergenceConfig]]:
    """Field, objective and divergence of all that measures one: the objective itself, or terms of a sum."""
    match objective:
        case SumObjective(terms=terms):
            inner = [(f"{field}.terms.{place}.objective", term.objective) for place, term in enumerate(terms)]
            return [found for at, own in inner for found in _divergences(own, at)]
        case DistillObjective(divergence=divergence) | RlGkdObjective(divergence=divergence):
            return [(field, objective, divergence)]
        case SeqKdObjective(divergence=divergence) if divergence is not None:
            return [(field, objective, divergence)]
        case _:
            return []


def _check_zero(forward: ResponseForward, config: BuiltObjective, divergence: DivergenceConfig, *, field: str) -> None:
    # Token weights are tried out on their own (`gkd.objectives.custom`), on inputs that have all that they may read.
    objective = build_objective(config.model_copy(update={"token_weight": None}), field=field)
    rows = forward.num_head_rows
    sequences = [torch.randint(0, rows, (prompt + response,)).tolist() for prompt, response in _LENGTHS]
    prompts = [tokens[:prompt] for tokens, (prompt, _) in zip(sequences, _LENGTHS, strict=True)]
    responses = [tokens[prompt:] for tokens, (prompt, _) in zip(sequences, _LENGTHS, strict=True)]
    packed = pack(prompts, responses, share_rows=forward.share_rows)
    with torch.no_grad():
        teacher_TV = forward(packed)
    student_TV = forward(packed)
    student_TV.retain_grad()
    output = objective(
        ObjectiveInputs(
            student=WholeLogits(student_TV),
            num_rows=rows,
            teacher=WholeView(WholeLogits(teacher_TV)),
            response_ids_T=packed.response_ids_T,
            mask_T=torch.ones_like(packed.response_ids_T, dtype=torch.bool),
            lengths=packed.response_lengths,
            on_policy_N=torch.ones(len(prompts), dtype=torch.bool),
            # Rewards that are all the same have no part in the loss.
            advantages_N=torch.zeros(len(prompts)),
            sequence_scale_N=torch.ones(len(prompts)),
        )
    )
    token_weights = torch.tensor(sequence_token_weights(packed.response_lengths, config.reduction))
    weights_T = torch.repeat_interleave(token_weights, torch.tensor(packed.response_lengths))
    loss = weighted_sum(output.loss_T, weights_T, output.mask_T)
    if not abs(loss.item()) <= _TOLERANCE:
        raise _wrong(divergence, f"is {loss.item():.3g}", field=field)
    loss.backward()
    assert student_TV.grad is not None
    gradient = student_TV.grad.abs().max().item()
    if not gradient <= _TOLERANCE:
        raise _wrong(divergence, f"has a gradient of {gradient:.3g}", field=field)


def _wrong(divergence: DivergenceConfig, found: str, *, field: str) -> UserError:
    return UserError(
        f"{field}.divergence",
        getattr(divergence, "path", divergence.type),
        f"{found} where teacher and student are the same model.",
        "A divergence is 0 there, and so is its gradient: correct the function.",
    )


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().partition("\n")[0].rstrip(".")
