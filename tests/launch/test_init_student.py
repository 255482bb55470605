"""`gkd init-student`: what is written, and what is refused before any weights are read."""

import io
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny import EOS, make_config, make_tokenizer, save_model

from gkd.config import load_config
from gkd.version import __version__
from launch.check import run_check
from launch.models import read_model

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "truncate"


def write_teacher(folder, architecture="llama", *, num_layers=4, dtype=torch.float32):
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = make_config(architecture)
    config.num_hidden_layers = num_layers
    if hasattr(config, "layer_types"):
        config.layer_types = ["full_attention"] * num_layers
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config = GenerationConfig(eos_token_id=[EOS, 2], max_new_tokens=7)
    model.save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("init") / "teacher")


@pytest.fixture
def init_student(run_command_line):
    """`init_student(*arguments)` -> (exit code, stdout, stderr)."""
    return partial(run_command_line, "init-student")


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def greedy(model):
    ids = torch.tensor([[2, 5, 3, 9]])
    given = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **given).tolist()


@pytest.mark.parametrize(
    ("options", "layers", "strategy"),
    [
        (["--layers", 2], [0, 2], "spaced_from_first"),
        (["--layers", 2, "--keep", "uniform"], [0, 3], "uniform"),
        (["--keep-layers", "0,2,3"], [0, 2, 3], None),
        (["--keep-layers", "1, 3", "--layers", 2], [1, 3], None),
    ],
)
def test_the_folder_is_the_truncated_model(teacher, init_student, tmp_path, options, layers, strategy):
    from transformers import AutoTokenizer, GenerationConfig

    from gkd.compress.truncate import truncate

    output = tmp_path / "made" / "student"
    code, out, err = init_student(teacher, output, *options)
    assert code == 0, err
    origin = json.loads((output / "truncation.json").read_text())
    assert origin == {
        "source": str(teacher),
        "source_layers": 4,
        "strategy": strategy,
        "layers": layers,
        "weights": "of the source",
        "gkd_version": __version__,
    }
    whole = load(teacher)
    before = whole.num_parameters()
    wanted, student = truncate(whole, layers), load(output)
    assert greedy(student) == greedy(wanted)
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(student.state_dict()[name], tensor)
    for text in (f"{before:,}", f"{student.num_parameters():,}", f"{student.num_parameters() / before:.1%}"):
        assert text in out
    assert ", ".join(map(str, layers)) in out
    assert AutoTokenizer.from_pretrained(output).chat_template == "{{ messages[0].content }}"
    assert GenerationConfig.from_pretrained(output).eos_token_id == [EOS, 2]
    assert read_model(str(output), field="student.model", need_weights=True).stop_ids == {EOS, 2}
    assert [path.name for path in output.parent.iterdir()] == ["student"], "nothing is left beside it"


def test_random_weights_have_the_same_shape(teacher, init_student, tmp_path):
    from transformers import GenerationConfig

    folders = {name: tmp_path / name for name in ("kept", "a", "again", "b")}
    for name, options in {"kept": [], "a": ["--random"], "again": ["--random"], "b": ["--random", "--seed", 1]}.items():
        code, out, err = init_student(teacher, folders[name], "--layers", 2, *options)
        assert code == 0, err
        assert ("│ random " in out) == (name != "kept")
    kept, a, again, b = (load(folder).state_dict() for folder in folders.values())
    assert {k: v.shape for k, v in kept.items()} == {k: v.shape for k, v in a.items()}
    embeddings = "model.embed_tokens.weight"
    assert all(torch.equal(a[name], again[name]) for name in a)
    assert not torch.allclose(a[embeddings], kept[embeddings]) and not torch.allclose(a[embeddings], b[embeddings])
    configs = [json.loads((folder / "config.json").read_text()) for folder in folders.values()]
    assert all(config == configs[0] for config in configs)
    assert GenerationConfig.from_pretrained(folders["a"]).eos_token_id == [EOS, 2]
    assert json.loads((folders["b"] / "truncation.json").read_text())["weights"] == "random, seed 1"


def test_random_weights_need_no_weights(teacher, init_student, tmp_path):
    shape = tmp_path / "shape"
    shape.mkdir()
    for path in teacher.iterdir():
        if path.suffix == ".json" and path.name != "generation_config.json":
            (shape / path.name).write_text(path.read_text())
    assert init_student(shape, tmp_path / "out", "--layers", 1)[0] == 2
    code, _, err = init_student(shape, tmp_path / "out", "--layers", 1, "--random")
    assert code == 0, err
    assert load(tmp_path / "out").config.num_hidden_layers == 1


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2", "gpt2", "opt"])
def test_precision_and_tied_heads_stay(architecture, init_student, tmp_path):
    from safetensors.torch import load_file

    teacher = write_teacher(tmp_path / "teacher", architecture, dtype=torch.bfloat16)
    for name, options in {"kept": [], "random": ["--random"]}.items():
        code, _, err = init_student(teacher, tmp_path / name, "--layers", 3, *options)
        assert code == 0, err
        ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / name, teacher))
        assert {tensor.dtype for tensor in ours.values()} == {torch.bfloat16}
        assert len(ours) < len(theirs) and ours.keys() < theirs.keys()
    assert json.loads((tmp_path / "kept" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.fixture(scope="module")
def broken(teacher, tmp_path_factory):
    """Folders that cannot be read or written."""
    root = tmp_path_factory.mktemp("broken")
    (root / "nothing").mkdir()
    (root / "taken").mkdir()
    (root / "taken" / "file").write_text("x")
    (root / "weightless").mkdir()
    make_tokenizer().save_pretrained(root / "weightless")
    make_config("llama").save_pretrained(root / "weightless")
    scaled = save_model(root / "scaled", "gpt2")
    for folder, changes in {
        Path(scaled): {"scale_attn_by_inverse_layer_idx": True, "n_layer": 4},
        root / "quantized": {"quantization_config": {"quant_method": "fp8"}},
    }.items():
        folder.mkdir(exist_ok=True)
        if not (folder / "config.json").exists():
            for path in teacher.iterdir():
                (folder / path.name).write_bytes(path.read_bytes())
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
    return root


MISTAKES = [
    ("teacher", [], "--layers", "how many layers"),
    ("teacher", ["--keep", "uniform"], "--layers", "how many layers"),
    ("teacher", ["--layers", 0], "--layers", "Keep 1 to 3"),
    ("teacher", ["--layers", -1], "--layers", "Keep 1 to 3"),
    ("teacher", ["--layers", 4], "--layers", "Keep 1 to 3"),
    ("teacher", ["--layers", 9], "--layers", "Keep 1 to 3"),
    ("teacher", ["--layers", 2, "--keep", "middle"], "--keep", "first_k, last_k"),
    ("teacher", ["--layers", 3, "--keep", "every_other"], "--layers", "keeps 2 of 4"),
    ("teacher", ["--keep-layers", "0,4"], "--keep-layers", "0 to 3"),
    ("teacher", ["--keep-layers", "0,-1"], "--keep-layers", "as 0,2,5"),
    ("teacher", ["--keep-layers", "0,a"], "--keep-layers", "as 0,2,5"),
    ("teacher", ["--keep-layers", ""], "--keep-layers", "as 0,2,5"),
    ("teacher", ["--keep-layers", "2,0"], "--keep-layers", "Write 0,2"),
    ("teacher", ["--keep-layers", "0,0,1"], "--keep-layers", "Write 0,1"),
    ("teacher", ["--keep-layers", "0,1,2,3"], "--keep-layers", "Leave at least one out"),
    ("teacher", ["--keep-layers", "0,1", "--layers", 3], "--layers", "which names 2"),
    ("teacher", ["--keep-layers", "0,1", "--keep", "uniform"], "--keep-layers", "one of the two"),
    ("nowhere", ["--layers", 2], "TEACHER", "Hugging Face format"),
    ("nothing", ["--layers", 2], "TEACHER", "config.json"),
    ("weightless", ["--layers", 1], "TEACHER", "no weights"),
    ("quantized", ["--layers", 2], "TEACHER", "made from"),
    ("scaled", ["--keep-layers", "0,2"], "TEACHER", "layer 2 in the place of layer 1"),
    ("teacher", ["--layers", 2, "taken"], "OUTPUT", "another folder"),
    ("teacher", ["--layers", 2, "taken/file"], "OUTPUT", "another folder"),
]


@pytest.mark.parametrize(("model", "options", "field", "says"), MISTAKES)
def test_mistakes(teacher, broken, init_student, tmp_path, monkeypatch, model, options, field, says):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)  # weights are not read before
    where = [broken / option for option in options if str(option).startswith("taken")]
    output = where[0] if where else tmp_path / "out"
    options = [option for option in options if not str(option).startswith("taken")]
    code, _, err = init_student(teacher if model == "teacher" else broken / model, output, *options)
    assert code == 2 and err.startswith(f"error: {field} = ")
    assert says in err.replace("\n", " ")
    assert not (tmp_path / "out").exists()
    assert (broken / "taken" / "file").read_text() == "x"


@pytest.mark.parametrize("name", ["1_continue", "2_distill"])
def test_a_recipe_passes_the_check_where_the_quickstart_has_been(name, init_student, tmp_path, monkeypatch):
    from launch.chain_sum import prepare

    prepare(tmp_path / "outputs" / "quickstart")
    monkeypatch.chdir(tmp_path)
    for folder in ("quickstart/teacher/export", "truncate/student", "truncate/continue/export"):
        layers = [] if folder.startswith("quickstart") else ["--layers", 3]
        if layers:
            assert init_student("outputs/quickstart/teacher/export", f"outputs/{folder}", *layers)[0] == 0
        else:
            _random_model("outputs/quickstart/models/teacher", f"outputs/{folder}")
    output = io.StringIO()
    run_check(load_config(CONFIGS / f"{name}.yaml", []), Console(file=output, width=200), offline=True)
    assert "not on this host" not in output.getvalue()
    header = "".join(line for line in (CONFIGS / f"{name}.yaml").read_text().splitlines(True) if line[0] == "#")
    assert "gkd init-student" in header and f"gkd train configs/truncate/{name}.yaml" in header
    assert "arXiv 2305.14864" in header


def _random_model(shape, folder):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(shape)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(shape).save_pretrained(folder)
