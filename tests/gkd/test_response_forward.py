import pytest
import torch
from tiny import VOCABULARY, make_model

from gkd.packing import pack
from gkd.response_forward import ResponseForward

ARCHITECTURES = ["qwen2", "llama", "gpt2", "opt", "phi", "gemma2"]
PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11, 12], [2, 3]]
RESPONSES = [[4, 5], [9, 9, 2, 3, 4, 1], [], [5, 1]]


def alone(model, prompt, response):
    """The plain forward pass of one sequence."""
    logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0]
    return logits[len(prompt) - 1 : len(prompt) - 1 + len(response)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("share_rows", [False, True])
def test_logits_equal_those_of_each_sequence_alone(architecture, share_rows):
    model = make_model(architecture)
    expected = torch.cat([alone(model, p, r) for p, r in zip(PROMPTS, RESPONSES, strict=True)])
    forward = ResponseForward(model)
    packed = pack(PROMPTS, RESPONSES, share_rows=share_rows and forward.share_rows)
    torch.testing.assert_close(forward(packed), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_equal_those_of_the_plain_forward(architecture):
    model = make_model(architecture)
    torch.cat([alone(model, p, r) for p, r in zip(PROMPTS, RESPONSES, strict=True)]).logsumexp(-1).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    forward = ResponseForward(model)
    forward(pack(PROMPTS, RESPONSES, share_rows=forward.share_rows)).logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-4, msg=name)


def test_rows_are_shared_only_where_sequences_do_not_leak():
    # OPT ignores position ids when it builds its mask: sequences in one row see each other there.
    leak = ResponseForward(make_model("opt"))
    assert leak.packing_gap() > 1e-2
    assert not leak.share_rows
    for architecture in ("qwen2", "llama", "gemma2"):
        forward = ResponseForward(make_model(architecture))
        assert forward.share_rows
        assert forward.packing_gap() < 1e-4


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_bfloat16_models_with_large_logits_are_accepted(architecture):
    model = make_model(architecture).to(torch.bfloat16)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    forward = ResponseForward(model)
    logits = forward(pack(PROMPTS, RESPONSES, share_rows=False))
    assert logits.dtype == torch.bfloat16 and logits.abs().max() > 16


def test_the_heads_rows_are_counted_with_padding():
    assert ResponseForward(make_model("qwen2", rows=32)).num_head_rows == 32
    assert ResponseForward(make_model("llama")).num_head_rows == VOCABULARY
