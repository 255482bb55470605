"""Heads that are not all there is between hidden states and logits: found out before a worker starts."""

import copy

import pytest
import torch
from tiny import EOS, VOCABULARY, config_tree, make_config, make_tokenizer, save_model, write_records

from gkd.config import parse_config
from gkd.errors import UserError
from gkd.response_forward import ResponseForward
from gkd.signals import SignalKind
from launch.preflight import check
from launch.small_copy import head_stands_alone, small_copy
from launch.teachers import teacher_settings
from rollout.hf_teacher import HfTeacher


def decoder_with_a_transform():
    """BERT as a causal model: its head transforms the hidden states before its last linear layer."""
    from transformers import BertConfig

    return BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        is_decoder=True, eos_token_id=EOS, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip


def large_and_unusual():
    """Billions of parameters, their number under other names than those that most configs use."""
    from transformers import xLSTMConfig

    return xLSTMConfig(vocab_size=64)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "opt", "phi", "gemma2"])
def test_most_heads_stand_alone(architecture):
    config = make_config(architecture)
    before, state = copy.deepcopy(config.to_dict()), torch.get_rng_state()
    assert head_stands_alone(config)
    assert config.to_dict() == before and torch.equal(torch.get_rng_state(), state)


def test_what_stands_between_head_and_logits_is_seen_as_the_worker_sees_it():
    from transformers import AutoModelForCausalLM, RecurrentGemmaConfig

    bert = decoder_with_a_transform()
    assert not head_stands_alone(bert)
    assert not ResponseForward(AutoModelForCausalLM.from_config(bert).eval()).has_own_head
    # A softcap under a name of its own: on random weights, whose logits are small, it would not show.
    assert not head_stands_alone(RecurrentGemmaConfig(hidden_size=64, num_attention_heads=2, lru_width=64))


def test_an_architecture_of_which_no_small_copy_can_be_made_is_left_to_the_worker():
    with pytest.raises(ValueError, match="parameters are left"):
        small_copy(large_and_unusual())
    assert head_stands_alone(large_and_unusual())


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("heads")
    narrow = make_config("llama")
    narrow.hidden_size, narrow.head_dim = 16, 8
    models = {"llama": save_model(root / "llama", "llama")}
    for name, architecture in (("bert", decoder_with_a_transform()), ("narrow", narrow)):
        AutoModelForCausalLM.from_config(architecture).save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
        models[name] = str(root / name)
    return models, config_tree(root / "out", "", "", write_records(root / "train.jsonl", 4))


def config(setup, student, teacher, objective=None, **changes):
    models, tree = setup
    tree = copy.deepcopy(tree)
    tree["student"]["model"], tree["teacher"] = models[student], {"model": models[teacher]} | changes
    if objective is not None:
        tree["objective"], tree["data"]["on_policy_fraction"] = {"type": "moment_matching"} | objective, 0.5
    return parse_config(tree)


def test_auto_sends_logits_where_hidden_states_are_not_enough_and_the_worker_can(setup):
    parsed = config(setup, "llama", "bert")
    facts = check(parsed, this_host=False)
    assert facts.sizes.signals == (SignalKind.FULL_LOGITS,)
    assert check(config(setup, "llama", "narrow"), this_host=False).sizes.signals == (SignalKind.HIDDEN_STATES,)
    (settings,) = teacher_settings(parsed, facts, on_gpu=False)
    assert HfTeacher(settings)._forward.has_own_head is False


@pytest.mark.parametrize(
    ("student", "teacher", "objective", "changes", "field", "words"),
    [
        ("llama", "bert", None, {"signal": "hidden_states"}, "teacher.model", "Set teacher.signal to full_logits"),
        ("llama", "bert", {}, {}, "teacher.model", "sent to the moment_matching objective"),
        (
            "bert",
            "llama",
            {"trunk": "own"},
            {},
            "student.model",
            "critics of moment_matching read these.*another student",
        ),
        ("bert", "llama", {"trunk": "student"}, {}, "student.model", "critics of moment_matching read these"),
        (
            "bert",
            "llama",
            {"trunk": "own", "off_policy_weight": 1.0},
            {},
            "student.model",
            "critics of moment_matching read these",
        ),
    ],
)
def test_what_would_need_the_head_alone_is_refused(setup, student, teacher, objective, changes, field, words):
    parsed = config(setup, student, teacher, objective, **changes)
    with pytest.raises(UserError, match=words) as caught:
        check(parsed, this_host=False)
    assert caught.value.field == field


@pytest.mark.parametrize("objective", [{}, {"trunk": "own", "off_policy_weight": 0.0}])
def test_critics_that_read_the_teacher_alone_do_not_mind_the_student(setup, objective):
    parsed = config(setup, "bert", "llama", objective)
    assert check(parsed, this_host=False).sizes.signals == (SignalKind.HIDDEN_STATES,)
