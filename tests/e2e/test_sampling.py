"""What the engine draws is what the model says: counts of the real engine against transformers' probabilities."""

from collections import Counter

import pytest
import ray
import torch
from engines import generator_settings
from tiny import VOCABULARY

from gkd.model_loading import load_causal_lm
from gkd.types import Prompt, SampleId
from rollout.rollout_actor import RolloutActor, generate

PROMPT = (2, 3, 5)
SAMPLES = 4000
UNLIKELY = 1e-4
"""Chance that right counts are called wrong."""


def probabilities(model, temperature, top_p):
    """Of the token after the prompt, in float64."""
    network = load_causal_lm(model, dtype="float32", init="pretrained")
    with torch.no_grad():
        logits = network(torch.tensor([PROMPT])).logits[0, -1, :VOCABULARY].double()
    shares, order = (logits / temperature).softmax(-1).sort(descending=True)
    shares[shares.cumsum(0) - shares >= top_p] = 0
    return torch.zeros(VOCABULARY, dtype=torch.float64).scatter(0, order, shares / shares.sum())


@pytest.mark.parametrize(("top_p", "temperatures"), [(1.0, (1.0, 0.5)), (0.8, (0.7,))])
def test_tokens_are_drawn_as_often_as_the_model_says(models, ray_cluster, top_p, temperatures):
    model = models("qwen2", tied=True, rows=32)
    settings = generator_settings(model, top_p=top_p, max_new_tokens=1, stop_ids=())
    actor = RolloutActor.options(num_cpus=0).remote(settings)
    prompts = [Prompt(id=SampleId(0, 0, i), token_ids=PROMPT) for i in range(SAMPLES)]
    for temperature in temperatures:
        sampled = generate(actor, prompts, temperature=temperature, timeout_s=120)
        expected = probabilities(model, temperature, top_p)
        counts = torch.zeros(VOCABULARY, dtype=torch.float64)
        for token, count in Counter(rollout.response_ids[0] for rollout in sampled).items():
            counts[token] = count
        assert not counts[expected == 0].any()
        likely = expected > 0
        statistic = ((counts - SAMPLES * expected) ** 2 / (SAMPLES * expected))[likely].sum()
        freedom = torch.tensor((int(likely.sum()) - 1) / 2, dtype=torch.float64)
        assert torch.special.gammaincc(freedom, statistic / 2) > UNLIKELY
    greedy = generate(actor, prompts[:2], temperature=0.0, timeout_s=120)
    ray.kill(actor)
    assert {rollout.response_ids for rollout in greedy} == {(int(expected.argmax()),)}
