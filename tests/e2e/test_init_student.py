"""A truncated student in the rollout engine, which reads the folder with code of its own."""

import io

import pytest
from engines import greedy_in_transformers, greedy_in_vllm
from rich.console import Console
from tiny import make_config, make_tokenizer

from launch.init_student import InitStudentRequest, run_init_student

PROMPTS = [[2 + i, 2 + i * 5 % 16, 2 + i * 7 % 16] for i in range(16)]


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "layers"), [("llama", "0,2"), ("qwen2", "1,2"), ("gemma2", "0,3")])
def test_vllm_and_transformers_read_the_same_student(architecture, layers, tmp_path, ray_cluster):
    import torch
    from transformers import AutoModelForCausalLM

    config = make_config(architecture)
    config.num_hidden_layers = 4
    if hasattr(config, "layer_types"):  # layer 3 has another window than layer 1, in whose place it comes
        kinds = ["sliding_attention", "full_attention"] if architecture == "gemma2" else ["full_attention"] * 2
        config.layer_types, config.sliding_window = [*kinds, *reversed(kinds)], 4
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "teacher")
    make_tokenizer().save_pretrained(tmp_path / "teacher")
    request = InitStudentRequest(
        teacher=str(tmp_path / "teacher"),
        output=tmp_path / "student",
        num_layers=None,
        strategy=None,
        layers=layers,
        random=False,
        seed=0,
    )
    run_init_student(request, Console(file=io.StringIO()))
    answers = greedy_in_transformers(tmp_path / "student", PROMPTS)
    assert answers != greedy_in_transformers(tmp_path / "teacher", PROMPTS)
    assert greedy_in_vllm(tmp_path / "student", PROMPTS) == answers
