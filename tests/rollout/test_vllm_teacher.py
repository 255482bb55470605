"""The teacher on vLLM, against a plain transformers forward of the same weights.

The engine runs in an actor: this process builds transformers models, and must not import vllm.
"""

import numpy as np
import pytest
import ray
import torch
from tiny import VOCABULARY, save_model

from gkd.arrays import to_tensor
from gkd.signals import SampledLogprobs, SignalKind, TopK
from gkd.types import Rollout, SampleId
from rollout.hf_teacher import TeacherSettings
from rollout.vllm_teacher import VllmTeacher, VllmTeacherSettings

HEAD_ROWS = 24  # more than the tokenizer knows: the signals are over the first VOCABULARY of them
TEMPERATURE = 0.7
TIMEOUT_S = 120
LENGTHS = [(1, 1), (5, 12), (3, 0), (9, 7), (2, 30), (12, 1)]  # of prompts and responses
K = 4


def settings(model, *, signal=SignalKind.FULL_LOGITS, **changes):
    teacher = TeacherSettings(
        model=str(model), dtype="float32", rows=VOCABULARY, signal=signal, top_k=K, temperature=TEMPERATURE
    )
    engine = {
        "max_model_len": 40,
        "max_concurrent": 8,
        "max_step_tokens": 256,
        "tensor_parallel_size": 1,
        "on_gpu": False,
        "kv_cache_gib": 0.1,
        "gpu_memory_utilization": 0.9,
    }
    return VllmTeacherSettings(teacher=teacher, **(engine | changes))


def start(model, **changes):
    return ray.remote(num_cpus=0)(VllmTeacher).remote(settings(model, **changes))


def ask(call):
    return ray.get(call, timeout=TIMEOUT_S)


def sequences():
    """Prompts and responses of many lengths, with tokens of the student's choice: some repeated, some missing."""
    random = np.random.default_rng(0)
    pairs = [
        tuple(random.integers(2, VOCABULARY, length).tolist() for length in (prompt, response))
        for prompt, response in LENGTHS
    ]
    extra = [random.integers(-1, VOCABULARY, (len(response), 3)).astype(np.int32) for _, response in pairs]
    return pairs, extra


@torch.no_grad()
def true_logits(model, pairs):
    """[T, VOCABULARY] float64 logits of each response, from one forward each."""
    from transformers import AutoModelForCausalLM

    # Eager attention: the default would leave out the softcap of Gemma-2.
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    loaded = AutoModelForCausalLM.from_pretrained(model, **options).eval()
    found = []
    for prompt, response in pairs:
        logits = loaded(input_ids=torch.tensor([prompt + response])).logits[0].double()
        found.append(logits[len(prompt) - 1 : len(prompt) - 1 + len(response), :VOCABULARY])
    return found


def check_top_k(signal, logits_TV, response, extra_TM):
    """The promised tokens, each once, with their log-probabilities, and the mass of the others."""
    width = K + 1 + (0 if extra_TM is None else extra_TM.shape[1])
    assert isinstance(signal, TopK) and signal.temperature == TEMPERATURE
    assert signal.ids_TK.shape == signal.logprobs_TK.shape == (len(response), width)
    assert (signal.ids_TK.dtype, signal.logprobs_TK.dtype) == (np.int32, np.float32)
    log_p_TV = (logits_TV / TEMPERATURE).log_softmax(-1)
    for t, token in enumerate(response):
        wanted = {token, *log_p_TV[t].topk(K).indices.tolist()}
        wanted |= set() if extra_TM is None else set(extra_TM[t].tolist()) - {-1}
        there = signal.ids_TK[t] >= 0
        ids = signal.ids_TK[t][there].tolist()
        assert sorted(ids) == sorted(wanted)
        np.testing.assert_allclose(signal.logprobs_TK[t][there], log_p_TV[t, ids], atol=1e-4)
        assert (signal.logprobs_TK[t][~there] == -np.inf).all()
        rest = [i for i in range(VOCABULARY) if i not in wanted]
        np.testing.assert_allclose(signal.tail_T[t], log_p_TV[t, rest].logsumexp(-1), atol=1e-4)
        np.testing.assert_allclose(signal.sampled_T[t], log_p_TV[t, token], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("qwen2", {}),
        ("gemma2", {"max_step_tokens": 8}),  # a logit softcap; nearly every sequence takes several forwards
        ("qwen2", {"tensor_parallel_size": 2}),
    ],
    ids=["whole", "in_chunks", "two_workers"],
)
def test_signals_are_those_of_a_transformers_forward(architecture, changes, tmp_path, ray_cluster):
    model = save_model(tmp_path, architecture, rows=HEAD_ROWS)
    pairs, extra = sequences()
    reference = true_logits(model, pairs)
    teacher = start(model, **changes)

    for signal, logits_TV, (_, response) in zip(
        ask(teacher.score_tokens.remote(pairs, top_k=None, extra_ids=None)), reference, pairs, strict=True
    ):
        assert isinstance(signal, SampledLogprobs) and signal.temperature == TEMPERATURE
        wanted_T = (logits_TV / TEMPERATURE).log_softmax(-1)[range(len(response)), response]
        np.testing.assert_allclose(signal.logprobs_T, wanted_T, atol=1e-4)

    for ids in (None, extra):
        signals = ask(teacher.score_tokens.remote(pairs, top_k=K, extra_ids=ids))
        for i, (logits_TV, (_, response)) in enumerate(zip(reference, pairs, strict=True)):
            check_top_k(signals[i], logits_TV, response, None if ids is None else ids[i])

    # The settings' own signal: logits, at temperature 1.
    for signal, logits_TV in zip(ask(teacher.score.remote(rollouts(pairs))), reference, strict=True):
        torch.testing.assert_close(to_tensor(signal.logits_TV).double(), logits_TV, atol=1e-4, rtol=1e-4)
    ray.kill(teacher)


@pytest.mark.slow
def test_a_rollout_brings_the_tokens_of_the_students_choice(tmp_path, ray_cluster):
    model = save_model(tmp_path, "qwen2", rows=HEAD_ROWS)
    pairs, extra = sequences()
    teacher = start(model, signal=SignalKind.TOP_K)
    # Twice: nothing of a sequence is remembered, though its keys and values could have been.
    for _ in range(2):
        signals = ask(teacher.score.remote(rollouts(pairs, extra)))
        for signal, logits_TV, (_, response), extra_TM in zip(
            signals, true_logits(model, pairs), pairs, extra, strict=True
        ):
            check_top_k(signal, logits_TV, response, extra_TM)
    assert ask(teacher.score.remote([])) == []
    ray.kill(teacher)


def test_hidden_states_are_refused():
    with pytest.raises(ValueError, match=r"full_logits, top_k or sampled_logprobs, not hidden_states.*teacher\.signal"):
        VllmTeacher(settings("nowhere", signal=SignalKind.HIDDEN_STATES))


def rollouts(pairs, extra=None):
    return [
        Rollout(
            id=SampleId(0, i, 0),
            prompt_ids=tuple(prompt),
            response_ids=tuple(response),
            stop_reason="length",
            source="student",
            versions=(0, 0),
            top_ids=None if extra is None else extra[i],
        )
        for i, (prompt, response) in enumerate(pairs)
    ]
