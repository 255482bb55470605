"""The command line as a user meets it: messages, exit codes; nothing expensive starts before a mistake shows."""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny import config_tree, make_tokenizer, save_model, write_records

from launch import cli


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """A folder with models and data, and the tree of a good config."""
    root = tmp_path_factory.mktemp("cli")
    student = save_model(root / "student", "llama")
    teacher = save_model(root / "teacher", "gpt2", rows=32)
    save_model(root / "foreign", "llama", extra="")
    (root / "foreign" / "tokenizer.json").write_text(
        (root / "foreign" / "tokenizer.json").read_text().replace('"a": 2', '"z": 2')
    )
    save_model(root / "short", "llama", context=20)
    train = write_records(root / "train.jsonl", 20)
    return root, config_tree(root / "out", student, teacher, train)


@pytest.fixture
def gkd(setup, tmp_path, capsys, monkeypatch):
    """`gkd(verb, *overrides)` -> (exit code, stdout, stderr), in this process; Ray must not start."""
    _, tree = setup
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree))

    def no_ray(*_args, **_kwargs):
        raise AssertionError("Ray was started before the mistake was found")

    monkeypatch.setattr("ray.init", no_ray)
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # other tests' Ray is not this command's

    def run(verb, *arguments, config_file=config):
        head = [str(config_file)] if verb in ("train", "check") else []
        monkeypatch.setattr(sys, "argv", ["gkd", verb, *head, *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_a_good_config_passes_the_check(gkd):
    code, out, err = gkd("check")
    assert (code, err) == (0, "")
    assert "20 used, 0 too long" in out and "18 rows" in out


def mistakes(root):
    folder = Path(root)
    broken = folder / "broken.jsonl"
    broken.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a",}\n')
    bare = folder / "bare.jsonl"
    bare.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    empty = folder / "empty.jsonl"
    empty.write_text("\n")
    no_weights = folder / "no_weights"
    no_weights.mkdir(exist_ok=True)
    (no_weights / "config.json").write_text((folder / "student" / "config.json").read_text())
    (folder / "a_file").write_text("")
    return [
        (["trainer.zero_stag=1"], "trainer.zero_stag", "zero_stage"),
        (["student.lora.r=4"], "student.lora", "not built yet"),
        (["student.model=/nowhere/at/all"], "student.model", "Hugging Face format"),
        ([f"student.model={no_weights}"], "student.model", "init: random"),
        ([f"student.model={folder}"], "student.model", "config.json"),
        ([f"teacher.model={folder / 'foreign'}"], "teacher.model", "another tokenizer"),
        (["data.train.path=absent.jsonl"], "data.train.path", "cannot be read"),
        ([f"data.train.path={broken}"], "data.train.path", "line 2"),
        ([f"data.train.path={empty}"], "data.train.path", "no records"),
        ([f"data.train.path={bare}", "data.on_policy_fraction=0.5"], "data.train.path", "has no completion"),
        ([f"data.train.path={bare}", "objective={type: sft}"], "data.train.path", "has no completion"),
        ([f"data.eval.path={broken}"], "data.eval.path", "line 2"),
        (["rollout.max_new_tokens=96"], "rollout.max_new_tokens", "below 96"),
        ([f"student.model={folder / 'short'}", "rollout.max_new_tokens=20"], "rollout.max_new_tokens", "below 20"),
        (["data.max_prompt_tokens=95"], "data.max_prompt_tokens", "at most 80"),
        ([f"run.output_dir={folder / 'a_file'}/out"], "run.output_dir", "another folder"),
        (["run.resume=/no/checkpoint"], "run.resume", "step_N"),
        (
            ["objective.divergence={type: custom, path: 'absent.module:fn'}"],
            "objective.divergence.path",
            "cannot be imported",
        ),
        (["objective.divergence.beta=1.0"], "objective.divergence.beta", "reverse_kl"),
    ]


@pytest.mark.parametrize("number", range(19))
@pytest.mark.parametrize("verb", ["train", "check"])
def test_a_mistake_is_one_message_and_exit_code_2(gkd, setup, verb, number):
    overrides, field, cure = mistakes(setup[0])[number]
    code, out, err = gkd(verb, *overrides)
    assert code == 2, out + err
    assert err.startswith(f"error: {field} = ")
    assert cure.replace(" ", "") in err.replace(" ", "").replace("\n", "")
    assert "Traceback" not in err and len(err.splitlines()) <= 6
    assert out == ""
    assert not (setup[0] / "out").exists()


def test_attention_heads_that_the_engine_cannot_run(gkd, tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=18, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "narrow")
    make_tokenizer().save_pretrained(tmp_path / "narrow")
    code, _, err = gkd("check", f"student.model={tmp_path / 'narrow'}")
    assert code == 2 and "width 16" in err and "32, 64" in err
    assert gkd("check", f"student.model={tmp_path / 'narrow'}", "data.on_policy_fraction=0")[0] == 0


def test_overlong_prompts_are_reported(gkd):
    code, out, _ = gkd("check", "data.max_prompt_tokens=6")
    assert code == 0
    assert "too long and are left out" in out.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "field", "cure"),
    [
        (["/nowhere"], "MODEL", "Hugging Face"),
        (["{student}", "--teacher", "/nowhere"], "--teacher", "Hugging Face"),
        (["{student}", "--teacher", "{foreign}"], "--teacher", "another tokenizer"),
        (["{student}", "--divergence", "kl"], "--divergence", "reverse_kl"),
        (["{student}", "--divergence", "total_variation"], "--divergence", "not built yet"),
        (["{student}", "--max-new-tokens", "500"], "--max-new-tokens", "context of 96"),
        (["{student}", "--data", "absent.jsonl"], "--data", "cannot be read"),
    ],
)
def test_mistakes_in_eval(gkd, setup, arguments, field, cure):
    root, tree = setup
    names = {"student": root / "student", "foreign": root / "foreign"}
    filled = [argument.format(**names) for argument in arguments]
    code, _, err = gkd("eval", "--data", tree["data"]["train"]["path"], *filled)
    assert code == 2
    assert err.startswith(f"error: {field} = ") and cure in err


def test_the_installed_command(setup, tmp_path):
    """In a process of its own: version, help, and a mistake found well within 15 s."""
    command = [str(Path(sys.executable).with_name("gkd"))]
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert version.stdout.startswith("gkd 0.")
    helped = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    assert all(verb in helped for verb in ("train", "check", "eval"))
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(setup[1]))
    started = time.monotonic()
    wrong = subprocess.run(
        [*command, "train", str(config), "teacher.model=/nowhere"], capture_output=True, text=True, check=False
    )
    assert time.monotonic() - started < 15
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr and "teacher.model" in wrong.stderr
    usage = subprocess.run([*command, "train"], capture_output=True, text=True, check=False)
    assert usage.returncode == 2


def test_data_with_overlong_records_only(gkd, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "a" * 90}) + "\n")
    code, _, err = gkd("check", f"data.train.path={path}")
    assert code == 2 and "no record fits" in err


def test_tokens_that_only_the_student_knows(gkd, tmp_path):
    """A stop token or data that the teacher cannot read is refused, not cut off in silence."""
    student = Path(save_model(tmp_path / "student", "llama", rows=24, extra="z"))
    assert gkd("check", f"student.model={student}")[0] == 0  # a token that nothing uses does no harm
    data = tmp_path / "z.jsonl"
    data.write_text(json.dumps({"prompt": "azb"}) + "\n")
    code, _, err = gkd("check", f"student.model={student}", f"data.train.path={data}")
    assert code == 2 and "'z'" in err and "beyond the 18 tokens" in err

    tokenizer = make_tokenizer(extra="z")
    tokenizer.eos_token = "z"
    tokenizer.save_pretrained(student)
    code, _, err = gkd("check", f"student.model={student}")
    assert code == 2 and "stop token 'z'" in err


def test_completions_that_are_never_used_can_neither_be_too_long_nor_be_missed(gkd, tmp_path):
    data = tmp_path / "long.jsonl"
    data.write_text(json.dumps({"prompt": "a", "completion": "b" * 200}) + "\n")
    assert gkd("check", f"data.train.path={data}")[0] == 0
    code, _, err = gkd("check", f"data.train.path={data}", "data.on_policy_fraction=0.5")
    assert code == 2 and "no record fits" in err


def test_a_cluster_that_does_not_answer(gkd, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    code, _, err = gkd("train")
    assert code == 2 and err.startswith("error: RAY_ADDRESS = ") and "unset it" in err
