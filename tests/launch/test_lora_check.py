import pytest
from tiny import make_config, make_model

from gkd.config.models import LoraConfig
from gkd.errors import UserError
from launch.architecture import read_architecture
from launch.lora_check import check_lora


@pytest.fixture
def architecture(tmp_path):
    def read(name):
        make_config(name).save_pretrained(tmp_path / name)
        return read_architecture(str(tmp_path / name), field="student.model")

    return read


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "opt", "phi", "gemma2"])
def test_all_linear_means_the_layers_that_peft_takes(architecture, name):
    lora = LoraConfig(r=3)
    assert check_lora(lora, architecture(name), needs_engine=False) == trained_by_peft(name, lora)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "down_proj"], ["model.layers.1.self_attn.v_proj"]])
def test_names_mean_what_they_mean_to_peft(architecture, targets):
    lora = LoraConfig(r=2, targets=targets)
    assert check_lora(lora, architecture("llama"), needs_engine=True) == trained_by_peft("llama", lora)


def trained_by_peft(name, lora):
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    options = PeftConfig(r=lora.r, target_modules=lora.targets, task_type="CAUSAL_LM")
    model = get_peft_model(make_model(name), options)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    ("targets", "problem"),
    [
        (["q_proj", "proj"], "'proj': matches no module of LlamaForCausalLM. Use some of: down_proj, gate_proj"),
        (["lm_head"], "'lm_head': is no linear layer below the head"),
        (["self_attn"], "'self_attn': is no linear layer"),
        (["embed_tokens"], "'embed_tokens': is no linear layer"),
        ([], "match no layer"),
    ],
)
def test_targets_that_are_not_there_are_refused(architecture, targets, problem):
    with pytest.raises(UserError) as caught:
        check_lora(LoraConfig(targets=targets), architecture("llama"), needs_engine=False)
    assert caught.value.field == "student.lora.targets" and problem in str(caught.value)


def test_architectures_that_the_engine_serves_without_adapters(architecture):
    with pytest.raises(UserError, match=r"GPT2LMHeadModel.*without adapters"):
        check_lora(LoraConfig(), architecture("gpt2"), needs_engine=True)
