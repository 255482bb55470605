"""What is said of a cache of teacher signals before a run."""

import io
import json
import shutil

import pytest
from rich.console import Console
from stored_signals import signal_of
from tiny import config_tree, make_model, save_model, write_records

from gkd.config import parse_config
from gkd.errors import UserError
from gkd.signals import SignalKind
from launch.check import run_check
from launch.preflight import check
from launch.score import run_score
from launch.signal_cache import fingerprint, given_texts, not_stored
from rollout.signal_store import SignalStore

TOP_K = {"signal": "top_k", "top_k": 3}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return save_model(root / "student", "qwen2"), save_model(root / "teacher", "llama", seed=1)


@pytest.fixture
def config(models, tmp_path):
    """`config(section={...}, ...)` has a cache, and learns from the dataset's text."""
    data = write_records(tmp_path / "train.jsonl", 6)

    def make(**changes):
        tree = config_tree(tmp_path / "out", *models, data)
        tree["data"]["on_policy_fraction"] = 0.0
        tree["teacher"]["cache"] = str(tmp_path / "cache")
        for section, values in changes.items():
            tree[section] = values if "type" in values else tree[section] | values
        return parse_config(tree)

    return make


def fill(config, kind=SignalKind.TOP_K, count=None):
    """Store something under the keys of a config's samples."""
    facts = check(config)
    store = SignalStore(facts.caches[0])
    texts = given_texts(facts.stages[0].data)[:count]
    store.put({store.key(text): signal_of(kind) for text in texts})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"objective": {"temperature": 2.0}},
            r"objective.temperature \(temperature\) was 1.0, and is 2.0",
        ),
        ({"teacher": TOP_K | {"top_k": 4}}, r"teacher.top_k \(top_k\) was 3, and is 4"),
        ({"teacher": TOP_K | {"dtype": "bfloat16"}}, r"teacher.dtype \(dtype\) was float32, and is bfloat16"),
        ({"teacher": {"signal": "full_logits"}}, r"teacher.signal \(kind\) was top_k, and is full_logits"),
    ],
)
def test_signals_of_another_making_are_refused(config, changes, words):
    fill(config(teacher=TOP_K))
    check(config(teacher=TOP_K))
    with pytest.raises(UserError, match=words) as caught:
        check(config(**({"teacher": TOP_K} | changes)))
    assert caught.value.field == "teacher.cache" and caught.value.cure.endswith(", or name another folder.")


def test_signals_that_can_be_brought_to_another_temperature_are_not(config):
    fill(config(teacher={"signal": "full_logits"}), SignalKind.FULL_LOGITS)
    hotter = check(config(teacher={"signal": "full_logits"}, objective={"temperature": 2.0}))
    assert not_stored(hotter.caches, given_texts(hotter.stages[0].data)) == []


def test_a_teacher_that_was_trained_on_is_another(config, models, tmp_path):
    fill(config(teacher=TOP_K))
    shutil.copytree(models[1], tmp_path / "moved")
    check(config(teacher=TOP_K | {"model": str(tmp_path / "moved")}))
    make_model("llama", seed=2).save_pretrained(tmp_path / "moved")
    with pytest.raises(UserError, match="another model, or its weights changed"):
        check(config(teacher=TOP_K | {"model": str(tmp_path / "moved")}))


def test_a_fingerprint_reads_parts_of_large_files(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model-1.safetensors"
    content = bytearray(2**23)
    weights.write_bytes(content)
    before = fingerprint(str(tmp_path))
    for number in range(0, len(content), 2**14):  # a 16 KiB block in four is read
        content[number] = 1
    weights.write_bytes(content)
    assert fingerprint(str(tmp_path)) != before
    weights.write_bytes(bytes(2**23 + 1))
    assert fingerprint(str(tmp_path)) != before
    weights.write_bytes(bytes(2**23))
    assert fingerprint(str(tmp_path)) == before
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert fingerprint(str(tmp_path)) != before
    assert fingerprint("nobody/nothing") == "nobody/nothing"


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("student", "other files"),
        ("out/cache", "outside"),
        ("around", "is around run.output_dir"),
        ("train.jsonl", "cannot be written"),
        ("list", "it is no JSON object"),
    ],
)
def test_folders_that_are_no_cache(config, models, tmp_path, where, words):
    folder = models[0] if where == "student" else tmp_path / where
    run = {"run": {"output_dir": str(folder / "runs" / "out")}} if where == "around" else {}
    if where == "list":
        folder.mkdir()
        (folder / "signal.json").write_text("[1]")
    with pytest.raises(UserError, match=words) as caught:
        check(config(teacher={"cache": str(folder)}, **run))
    assert caught.value.field == "teacher.cache"


def test_the_check_counts_what_is_stored(config):
    fill(config(teacher=TOP_K), count=4)
    output = io.StringIO()
    run_check(config(teacher=TOP_K), Console(file=output, width=200), offline=False)
    assert "samples in the caches" in output.getvalue() and "4 of 6" in output.getvalue()


def test_a_cache_of_which_nothing_comes_is_worth_a_note(config):
    (note,) = [note for note in check(config(data={"on_policy_fraction": 1.0})).warnings if "cache" in note]
    assert note.startswith("teacher.cache: every sample that is scored is written anew")
    assert not any("cache" in note for note in check(config()).warnings)


def test_where_all_is_stored_scoring_starts_nothing(config, monkeypatch):
    def no_ray(*_args, **_kwargs):
        raise AssertionError("Ray was started")

    monkeypatch.setattr("launch.score.ray_session", no_ray)
    fill(config(teacher=TOP_K))
    output = io.StringIO()
    run_score(config(teacher=TOP_K), Console(file=output, width=500))
    assert "0 samples scored; the signals of all 6 are in" in output.getvalue()


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"data": {"on_policy_fraction": 1.0}}, "data.on_policy_fraction", "Lower it"),
        ({"teacher": {"cache": None}}, "teacher.cache", "Name a folder"),
        ({"objective": {"type": "sft"}}, "objective.type", "Name such a teacher"),
        ({"objective": {"type": "seq_kd"}}, "objective.type", "write, and score nothing"),
        (
            {"objective": {"type": "seq_kd", "form": "divergence", "divergence": {"type": "forward_kl"}}},
            "objective.type",
            "the teacher writes every sample",
        ),
    ],
)
def test_what_cannot_be_scored_beforehand(config, changes, field, words):
    with pytest.raises(UserError, match=words) as caught:
        run_score(config(**changes), Console(file=io.StringIO()))
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("teachers", "words"),
    [
        ([{"backend": "student_ema", "cache": "c"}], "akes no `cache`"),
        ([{"name": n, "model": n, "cache": n} for n in ("c", "d/../c")], "give each a folder of its own"),
        ([{"name": n, "model": n, "cache": n} for n in ("c", "link")], "give each a folder of its own"),
    ],
)
def test_configs_with_caches_that_cannot_be(config, teachers, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "c")
    tree = json.loads(config().model_dump_json()) | {"teacher": None, "teachers": teachers}
    with pytest.raises(UserError, match=words):
        parse_config(tree)
