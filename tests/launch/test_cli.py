"""The command line as a user meets it: messages, exit codes; nothing expensive starts before a mistake shows."""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny import CHAT_TEMPLATE, config_tree, make_chat_tokenizer, make_tokenizer, save_model, write_records


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
    save_model(root / "chat", "llama", rows=32)
    make_chat_tokenizer().save_pretrained(root / "chat")
    train = write_records(root / "train.jsonl", 20)
    return root, config_tree(root / "out", student, teacher, train)


@pytest.fixture
def gkd(setup, tmp_path, run_command_line, monkeypatch):
    """`gkd(verb, *overrides)` -> (exit code, stdout, stderr), in this process; Ray must not start."""
    _, tree = setup
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree))

    def no_ray(*_args, **_kwargs):
        raise AssertionError("Ray was started before the mistake was found")

    monkeypatch.setattr("ray.init", no_ray)
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # other tests' Ray is not this command's

    def run(verb, *arguments, config_file=config):
        head = [config_file] if verb in ("train", "check", "score") else []
        return run_command_line(verb, *head, *arguments)

    return run


def test_a_good_config_passes_the_check(gkd):
    code, out, err = gkd("check")
    assert (code, err) == (0, "")
    assert "20 used, 0 too long" in out and "18 rows" in out


def write_chats(path, *conversations):
    """Conversations that a user begins, then in turn."""
    roles = ("user", "assistant")
    lines = []
    for contents in conversations:
        messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
        lines.append(json.dumps({"messages": messages}) + "\n")
    path.write_text("".join(lines))
    return path


_NUM_MISTAKES = 46


def mistakes(root):
    """Overrides that make a mistake, the field that the message names, and a part of the cure."""
    folder = Path(root)
    broken = folder / "broken.jsonl"
    broken.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a",}\n')
    bare = folder / "bare.jsonl"
    bare.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    chats = write_chats(folder / "chats.jsonl", ["ab", "c"], ["d"])
    empty = folder / "empty.jsonl"
    empty.write_text("\n")
    no_weights = folder / "no_weights"
    no_weights.mkdir(exist_ok=True)
    (no_weights / "config.json").write_text((folder / "student" / "config.json").read_text())
    (folder / "a_file").write_text("")
    prompts = folder / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    shape = json.loads((folder / "student" / "config.json").read_text())
    configs = {
        "t5": {"model_type": "t5"},
        "bert": {"model_type": "bert", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
        "odd": shape | {"num_key_value_heads": 0},
    }
    for name, config in configs.items():
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(config))
        make_tokenizer().save_pretrained(folder / name)
    gpt2 = f"student.model={folder / 'teacher'}"
    return [
        (["trainer.zero_stag=1"], "trainer.zero_stag", "zero_stage"),
        (["trainer.batch_size=many"], "trainer.batch_size", "valid integer"),
        (["trainer.zero_stage=4"], "trainer.zero_stage", "less than or equal to 3"),
        (["trainer.num_ranks=9"], "trainer.batch_size", "at least one"),
        (["sync={every_steps: 4, max_staleness: 2}"], "sync.every_steps", "at most 3"),
        (["teacher.backend=vllm", "teacher.signal=full_logits"], "teacher.signal", "Use top_k, or the backend hf"),
        (["teacher={backend: student_base}"], "teacher.backend", "add `student.lora"),
        (["student.lora.targets=[q_proj, wq]"], "student.lora.targets", "Use some of: down_proj"),
        (["student.lora.targets=[lm_head]"], "student.lora.targets", "no linear layer below the head"),
        (["student.lora.targets=[]"], "student.lora.targets", "Use some of: down_proj"),
        (["student.lora.r=4", "student.init=random"], "student.init", "use pretrained"),
        (["student.lora.r=4", gpt2], "student.lora", "without adapters"),
        ([f"student.model={folder / 't5'}", "student.init=random"], "student.model", "is a t5, not a causal"),
        ([f"student.model={folder / 'bert'}", "student.init=random"], "student.model", "Use a causal language model"),
        ([f"student.model={folder / 'odd'}", "student.init=random"], "student.model", "cannot be built from its"),
        ([f"data.eval.path={prompts}", "eval.every_steps=1"], "eval.metrics", "measure the divergence alone"),
        (["eval.every_steps=1"], "eval.every_steps", "data.eval"),
        (["eval.best=divergence"], "eval.best", "set eval.every_steps"),
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
        (["data.train.path=/no/folder"], "data.train.path", "does not exist"),
        (["data.train.path=nobody/nothing"], "data.train.path", "Couldn't reach"),
        ([f"data.train=[{{path: {bare}}}, {{path: {broken}}}]"], "data.train.1.path", "line 2"),
        ([f"data.train={{path: {bare}, prompt_field: text}}"], "data.train.path", "has no text and no messages"),
        ([f"data.train.path={chats}"], "student.model", "has no chat template"),
        ([f"data.train.path={chats}", "objective={type: sft}"], "data.train.path", "line 2"),
        (["data.train.split=test"], "data.train", "remove them"),
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
        (
            ["objective.divergence={type: custom, path: 'divergences:cross_entropy'}"],
            "objective.divergence",
            "where teacher and student are the same",
        ),
        (
            ["objective.divergence={type: custom, path: 'divergences:signed_difference'}"],
            "objective.divergence",
            "has a gradient of",
        ),
        (["run.output_dir=."], "run.output_dir", "a folder of its own"),
        (["max_steps"], "override", "trainer.max_steps=10"),
    ]


def test_all_mistakes_are_tried(setup):
    assert len(mistakes(setup[0])) == _NUM_MISTAKES


@pytest.mark.parametrize("number", range(_NUM_MISTAKES))
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


def test_overlong_records_are_cut_where_the_config_says_so(gkd, tmp_path):
    data = tmp_path / "long.jsonl"
    data.write_text("".join(json.dumps({"prompt": "a" * n, "completion": "b" * 5}) + "\n" for n in (4, 8, 12)))
    long = [f"data.train.path={data}", "data.max_prompt_tokens=6", "data.on_policy_fraction=0.5"]
    code, out, _ = gkd("check", *long)
    assert code == 0 and "1 used, 2 too long" in out
    assert "2 of 3 records are too long and are left out (data.overlong: drop)" in out.replace("\n", " ")
    code, out, _ = gkd("check", *long, "data.overlong=truncate")
    assert code == 0 and "3 used, 2 too long" in out
    assert "2 of 3 records are too long: 2 are cut, 0 are left out" in out.replace("\n", " ")


def test_conversations_pass_the_check(gkd, setup, tmp_path):
    root, _ = setup
    chats = write_chats(tmp_path / "chats.jsonl", ["ab", "c"], ["d", "e", "f", "g"])
    models = [f"student.model={root / 'chat'}", f"teacher.model={root / 'chat'}", f"data.train.path={chats}"]
    code, out, err = gkd("check", *models, "data.on_policy_fraction=0.5")
    assert (code, err) == (0, "") and "2 used, 0 too long" in out
    assert "43 tokens" in out  # turns of 9, 14 and 9, and 11 that ask for the next
    assert "write conversations differently" not in out.replace("\n", " ")
    code, out, _ = gkd("check", *models, "objective={type: sft}")
    assert code == 0 and "21 tokens" in out  # the longer prompt is asked of nobody


def test_chat_templates_that_differ_are_worth_a_note(gkd, setup, tmp_path):
    root, _ = setup
    chats = write_chats(tmp_path / "chats.jsonl", ["ab"])
    run = [f"student.model={root / 'chat'}", f"data.train.path={chats}"]
    for name, template, note in (
        ("other", CHAT_TEMPLATE.replace("assistant", "bot"), "write conversations differently"),
        ("none", None, "the teacher has no chat template"),
        ("strict", "{{ raise_exception('no') }}", "the teacher's chat template refuses"),
    ):
        teacher = save_model(tmp_path / name, "llama", rows=32)
        make_chat_tokenizer(template=template).save_pretrained(teacher)
        code, out, _ = gkd("check", *run, f"teacher.model={teacher}")
        assert code == 0 and note in out.replace("\n", " "), out
        assert note not in gkd("check", *run[:1], f"teacher.model={teacher}")[1].replace("\n", " ")


def test_the_check_says_what_each_worker_needs(gkd, setup):
    code, out, _ = gkd("check", "rollout={num_actors: 2, kv_cache_gib: 4000, max_new_tokens: 8}", "student.lora.r=4")
    assert code == 0 and "2 x rollout" in out and "key-value cache 4000.0" in out
    text = out.replace("\n", " ")
    assert "GiB free" in text and "most of it is for the key-value cache of the rollout (8000.0 GiB)" in text
    code, out, _ = gkd("check", "objective={type: sft}")
    assert code == 0 and "rollout" not in out and "has no use for a teacher" in out.replace("\n", " ")
    code, out, _ = gkd("check", "trainer.batch_size=21")
    assert code == 0 and "a step uses some records several times" in out.replace("\n", " ")


def test_offline_the_check_leaves_out_what_is_elsewhere(gkd):
    code, out, err = gkd("check", "teacher.model=nobody/nothing", "--offline")
    assert (code, err) == (0, "")
    assert "checked in part" in out and "3 GPUs in all" in out and "'nobody/nothing' is not on this host" in out
    code, out, _ = gkd("check", "--offline")
    assert code == 0 and "ready" in out and "20 used" in out
    assert gkd("check", "teacher.model=nobody/nothing")[0] == 2
    code, _, err = gkd("check", "teacher.model=nobody/nothing", "student.lora.targets=[wq]", "--offline")
    assert code == 2 and "student.lora.targets" in err


def test_sources_of_all_formats_pass_the_check(gkd, setup, tmp_path, monkeypatch):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"prompt": "ab", "completion": "c"}, {"prompt": "d", "completion": "e"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    jsonl = write_records(tmp_path / "data.jsonl", 3)
    paths = (jsonl, tmp_path / "data.parquet", tmp_path / "saved")
    weighted = ", ".join(f"{{path: {path}, weight: {i + 1}}}" for i, path in enumerate(paths))
    code, out, err = gkd("check", f"data.train=[{weighted}]", "data.on_policy_fraction=0.5")
    assert (code, err) == (0, "") and "7 used, 0 too long" in out

    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "a" * 90}) + "\n")
    long = f"data.train=[{{path: {jsonl}, weight: 1}}, {{path: {tmp_path / 'long.jsonl'}, weight: 1}}]"
    code, _, err = gkd("check", long)
    assert code == 2 and err.startswith("error: data.train.1.path = ") and "no record that fits" in err
    assert gkd("check", long.replace(", weight: 1", ""))[0] == 0  # shuffled together, nothing is owed to a source


@pytest.mark.parametrize(
    ("arguments", "field", "cure"),
    [
        (["/nowhere"], "MODEL", "Hugging Face"),
        (["{student}", "--teacher", "/nowhere"], "--teacher", "Hugging Face"),
        (["{student}", "--teacher", "{foreign}"], "--teacher", "another tokenizer"),
        (["{student}", "--divergence", "kl"], "--divergence", "reverse_kl"),
        (["{student}", "--max-new-tokens", "500"], "--max-new-tokens", "context of 96"),
        (["{student}", "--data", "absent.jsonl"], "--data", "cannot be read"),
        (["{student}", "--data", "nobody/nothing"], "--data", "Couldn't reach"),
        (["{student}", "--data", "{chats}", "--max-new-tokens", "8"], "MODEL", "has no chat template"),
    ],
)
def test_mistakes_in_eval(gkd, setup, arguments, field, cure):
    root, tree = setup
    chats = write_chats(root / "chats.jsonl", ["ab", "c"])
    names = {"student": root / "student", "foreign": root / "foreign", "chats": chats}
    filled = [argument.format(**names) for argument in arguments]
    code, _, err = gkd("eval", "--data", tree["data"]["train"]["path"], *filled)
    assert code == 2
    assert err.startswith(f"error: {field} = ") and cure in err


def test_a_cache_of_other_signals_ends_every_command_that_would_use_it(gkd, setup, tmp_path):
    (tmp_path / "cache").mkdir()
    stored = {"kind": "top_k", "temperature": 2.0}
    (tmp_path / "cache" / "signal.json").write_text(json.dumps(stored))
    changes = [f"teacher.cache={tmp_path / 'cache'}", "data.on_policy_fraction=0"]
    for verb in ("train", "check", "score"):
        code, _, err = gkd(verb, *changes)
        assert code == 2 and err.startswith("error: teacher.cache = ") and "or name another folder." in err
    code, _, err = gkd("score", *changes[:1], "data.on_policy_fraction=1")
    assert code == 2 and err.startswith("error: data.on_policy_fraction = ")
    assert not (setup[0] / "out").exists()


def test_the_installed_command(setup, tmp_path):
    """In a process of its own: version, help, and a mistake found well within 15 s."""
    command = [str(Path(sys.executable).with_name("gkd"))]
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert version.stdout.startswith("gkd 0.")
    helped = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    assert all(verb in helped for verb in ("train", "check", "eval", "generate"))
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


def test_a_whole_check_is_quick_and_imports_neither_vllm_nor_deepspeed(setup, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(setup[1]))
    code = (
        "import sys; from launch.cli import app; app(['check', sys.argv[1]], standalone_mode=False); "
        "sys.exit(', '.join({'vllm', 'deepspeed'} & set(sys.modules)) or 0)"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, str(config)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 15


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
