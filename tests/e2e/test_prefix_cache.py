"""What an engine remembers of old weights must never reach a sequence that begins under new ones.

The prefix cache outlives a sync: without the salt of each request's version, rollouts begun afterwards read keys and
values that the old weights made.
"""

import pytest
import ray
import torch
from engines import generator_settings
from tiny import save_model

from gkd.model_loading import load_causal_lm
from gkd.packing import pack
from gkd.response_forward import ResponseForward
from gkd.types import Prompt, SampleId
from rollout.rollout_actor import RolloutActor, RolloutPool, generate
from rollout.weights.object_store import ObjectStoreSender
from trainer.weights import checkpoint_weights, tied_names

PREFIX = tuple(2 + i % 16 for i in range(270))  # several cache blocks, and more than 2,048 prompt tokens in a step
SETTINGS = {"max_model_len": 340, "max_new_tokens": 60, "probe_prompts": (PREFIX, (3,)), "logprobs": True}


def prompts(epoch, count=6, samples=4):
    return [Prompt(id=SampleId(epoch, i, k), token_ids=(*PREFIX, 2 + i)) for i in range(count) for k in range(samples)]


@pytest.fixture(scope="module")
def new_model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("new") / "model", "qwen2", seed=9, tied=True, context=384)


def start(model):
    actor = RolloutActor.options(num_cpus=0).remote(generator_settings(model, **SETTINGS))
    actor.connect_weights.remote({})
    return actor


def update(actor, path, version):
    model = load_causal_lm(path, dtype="float32", init="pretrained")
    messages = list(ObjectStoreSender(bucket_bytes=20_000).send(checkpoint_weights(model), tied_names(model)))
    assert len(messages) > 4
    RolloutPool([actor], max_concurrent=64, timeout_s=60).update_weights(version, map(ray.put, messages))


def own_logprobs(path, rollouts):
    forward = ResponseForward(load_causal_lm(path, dtype="float32", init="pretrained"))
    packed = pack([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts], share_rows=False)
    with torch.no_grad():
        return forward(packed).log_softmax(-1).gather(-1, packed.response_ids_T.unsqueeze(-1)).squeeze(-1)


def test_rollouts_begun_after_a_sync_are_a_fresh_engines(models, new_model, ray_cluster):
    """Four samples a prompt share their prefix; syncs come while sequences are in flight and prefixes are cached."""
    old = models("qwen2", tied=True, context=384)
    actor = start(old)
    waiting = prompts(0)
    finished = {r.id: r for r in ray.get(actor.advance.remote(waiting))}  # 16 engine steps: most are in flight still
    ray.get(actor.probe.remote())
    assert len(finished) < len(waiting)
    update(actor, new_model, 1)
    update(actor, old, 2)  # back and forth: version 2's weights are version 0's, and version 1's prefixes are cached
    finished |= {r.id: r for r in ray.get(actor.advance.remote(prompts(1)))}
    update(actor, new_model, 3)
    finished |= {r.id: r for r in generate_all(actor, [*waiting, *prompts(1)], prompts(2), finished)}
    probe = ray.get(actor.probe.remote())
    ray.kill(actor)

    spans = {epoch: {r.versions for r in finished.values() if r.id.epoch == epoch} for epoch in range(3)}
    assert any(first == 0 and last == 3 for first, last in spans[0])  # they went on through three syncs
    assert {first for first, _ in spans[1]} == {2} and spans[2] == {(3, 3)}

    after = [r for r in finished.values() if r.id.epoch == 2]
    assert len(after) == 24
    fresh_actor = start(new_model)
    fresh = {r.id: r for r in generate(fresh_actor, prompts(2), temperature=1.0, timeout_s=120)}
    ray.kill(fresh_actor)
    for rollout in after:
        assert rollout.response_ids == fresh[rollout.id].response_ids
        assert rollout.logprobs == pytest.approx(fresh[rollout.id].logprobs, abs=1e-4)
    for rollouts in (after, probe):
        served = torch.tensor([value for r in rollouts for value in r.logprobs])
        torch.testing.assert_close(served, own_logprobs(new_model, rollouts), rtol=0, atol=1e-4)
    # The samples of a prompt did share: all but the first found most of it in the cache.
    cached = [r.num_cached_tokens for r in sorted(after, key=lambda r: r.id)]
    assert sum(tokens >= 128 for tokens in cached) >= len(after) * 3 // 4


@pytest.mark.slow
def test_another_trainers_versions_share_nothing_with_the_last_ones(models, new_model, ray_cluster):
    """An engine that is kept from run to run sees the same version number with other weights."""
    old = models("qwen2", tied=True, context=384)
    actor = start(old)
    update(actor, old, 1)
    generate_all(actor, [], prompts(0, count=2), {})
    actor.connect_weights.remote({})
    update(actor, new_model, 1)
    after = generate_all(actor, [], prompts(1, count=2), {})
    ray.kill(actor)
    ordered = sorted(after, key=lambda rollout: rollout.id)
    served = torch.tensor([value for rollout in ordered for value in rollout.logprobs])
    torch.testing.assert_close(served, own_logprobs(new_model, ordered), rtol=0, atol=1e-4)


def generate_all(actor, old, new, known):
    """Go on until everything in flight and some new prompts are done."""
    missing = {prompt.id for prompt in [*old, *new]} - known.keys()
    rollouts, waiting = [], new
    while missing:
        arrived = ray.get(actor.advance.remote(waiting))
        waiting = []
        rollouts += arrived
        missing -= {r.id for r in arrived}
    return rollouts
