import pytest
import torch
from tiny import VOCABULARY, make_model

from gkd.divergences import reverse_kl
from gkd.evaluation import divergence_sum, exact_match, negative_log_likelihood_sum
from gkd.response_forward import ResponseForward
from gkd.signals import FullLogits
from gkd.teacher_view import view_of
from gkd.types import Rollout, SampleId


def rollout(index, prompt, response, mask=None):
    return Rollout(
        id=SampleId(0, index, 0),
        prompt_ids=prompt,
        response_ids=response,
        stop_reason="dataset",
        source="dataset",
        versions=None,
        loss_mask=mask,
    )


def test_the_divergence_counts_the_tokens_in_the_loss():
    model = make_model("llama")
    rollouts = [
        rollout(0, (2, 3, 4), (5, 6, 1)),
        rollout(1, (7,), (8, 1, 9, 10, 1), mask=(True, True, False, False, True)),
        rollout(2, (11, 12), (13, 1), mask=(False, False)),
    ]
    torch.manual_seed(0)
    teacher = [torch.randn(len(r.response_ids), VOCABULARY) for r in rollouts]
    signals = [FullLogits.from_tensor(logits_TV) for logits_TV in teacher]
    view = view_of(signals, {}, rows=VOCABULARY, device=torch.device("cpu"))
    total, count = divergence_sum(ResponseForward(model), rollouts, view, reverse_kl, rows=VOCABULARY)

    expected = 0.0
    for r, logits_TV in zip(rollouts, teacher, strict=True):
        with torch.no_grad():
            whole_SV = model(input_ids=torch.tensor([r.token_ids])).logits[0]
        for t in range(len(r.response_ids)):
            if r.loss_mask is None or r.loss_mask[t]:
                student_V = whole_SV[len(r.prompt_ids) - 1 + t]
                expected += reverse_kl(student_V[None], logits_TV[t][None]).item()
    assert count == 3 + 3 + 0
    assert total == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rows", [VOCABULARY, VOCABULARY - 3])
def test_the_likelihood_is_of_the_tokens_in_the_loss(rows):
    model = make_model("qwen2")
    rollouts = [
        rollout(0, (2, 3, 4), (5, 6, 1)),
        rollout(1, (7,), (8, 1, 9, 10, 1), mask=(True, True, False, False, True)),
        rollout(2, (11, 12), (13, 1), mask=(False, False)),
    ]
    total, count = negative_log_likelihood_sum(ResponseForward(model), rollouts, rows=rows)
    expected = 0.0
    for r in rollouts:
        with torch.no_grad():
            log_p_SV = model(input_ids=torch.tensor([r.token_ids])).logits[0, :, :rows].log_softmax(-1)
        for t, token in enumerate(r.response_ids):
            if r.loss_mask is None or r.loss_mask[t]:
                expected -= log_p_SV[len(r.prompt_ids) - 1 + t, token].item()
    assert count == 3 + 3 + 0
    assert total == pytest.approx(expected, rel=1e-5)


def test_exact_match_is_a_share():
    assert exact_match(["a ", "b", "c"], ["a", "x", "\nc"]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="undefined"):
        exact_match([], [])
    with pytest.raises(ValueError):
        exact_match(["a"], [])
