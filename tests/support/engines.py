"""Rollout engines for tests, and greedy answers in both engines."""

import ray
import torch
from tiny import EOS, VOCABULARY

from gkd.types import Prompt, SampleId
from rollout.rollout_actor import RolloutActor, generate
from rollout.vllm_generator import GeneratorSettings


def generator_settings(model, **changes):
    """Settings of a small engine on a CPU host."""
    settings = {
        "model": str(model),
        "load_weights": True,
        "seed": 0,
        "temperature": 1.0,
        "top_p": 1.0,
        "max_new_tokens": 12,
        "max_model_len": 40,
        "max_concurrent": 64,
        "dtype": "float32",
        "tensor_parallel_size": 1,
        "adapter": None,
        "vocabulary": VOCABULARY,
        "stop_ids": (EOS,),
        "logprobs": False,
        "probe_prompts": ((2, 3),),
        "on_gpu": False,
        "kv_cache_gib": 0.1,
        "gpu_memory_utilization": 0.9,
        "weight_backend": "object_store",
    }
    return GeneratorSettings(**(settings | changes))


def greedy_in_vllm(model, prompts):
    """Up to 12 tokens after each prompt, by our own engine."""
    actor = RolloutActor.options(num_cpus=0).remote(generator_settings(model))
    wanted = [Prompt(id=SampleId(0, i, 0), token_ids=tuple(p)) for i, p in enumerate(prompts)]
    rollouts = generate(actor, wanted, temperature=0.0, timeout_s=120)
    ray.kill(actor)
    return [list(r.response_ids) for r in rollouts]


def greedy_in_vllm_with_adapter(base, adapter, prompts):
    """The same by vLLM's own loading of an adapter's folder."""

    @ray.remote(num_cpus=0)
    def answer():
        import os

        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest

        options = {"enable_lora": True, "max_lora_rank": 8, "max_model_len": 40, "kv_cache_memory_bytes": 10**8}
        engine = LLM(base, dtype="float32", enforce_eager=True, **options)
        params = SamplingParams(
            temperature=0.0, max_tokens=12, stop_token_ids=[EOS], allowed_token_ids=list(range(VOCABULARY))
        )
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = engine.generate(inputs, params, lora_request=LoRARequest("a", 1, str(adapter)))
        return [list(output.outputs[0].token_ids) for output in outputs]

    return ray.get(answer.remote())


def greedy_in_transformers(model, prompts):
    """The same by transformers; `model` is a folder or a model."""
    from transformers import AutoModelForCausalLM

    is_folder = not isinstance(model, torch.nn.Module)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval() if is_folder else model
    answers = []
    for prompt in prompts:
        ids = list(prompt)
        while len(ids) - len(prompt) < 12 and ids[-1] != EOS:
            # As the engine does: rows of the head beyond the tokenizer are no tokens.
            ids.append(int(loaded(input_ids=torch.tensor([ids])).logits[0, -1, :VOCABULARY].argmax()))
        answers.append(ids[len(prompt) :])
    return answers
