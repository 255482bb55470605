import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from refusals import refused

from gkd.config import dump_config, load_config, parse_config
from gkd.errors import NotBuiltYet, UserError

ROOT = Path(__file__).resolve().parents[3]
MINIMAL = """
run: {name: tiny, seed: 3, output_dir: outputs/tiny, resume: never}
student: {model: path/to/student}
teacher: {model: path/to/teacher}
data: {train: {path: train.jsonl}, eval: {path: eval.jsonl}, on_policy_fraction: 1.0}
rollout: {num_actors: 1, temperature: 1.0, max_new_tokens: 16}
objective: {type: distill, divergence: {type: generalized_jsd, beta: 0.5}}
trainer: {num_ranks: 1, zero_stage: 2, max_steps: 4, batch_size: 8, learning_rate: 0.001, checkpoint_every: 2}
sync: {max_staleness: 0}
"""


@pytest.fixture
def minimal(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL)
    return path


def test_the_smallest_config_is_valid_and_survives_its_own_dump(minimal):
    config = load_config(minimal)
    assert config.trainer.lr_schedule == "constant" and config.trainer.warmup_steps == 0
    assert config.max_logprob_gap == 1e-3
    assert parse_config(yaml.safe_load(dump_config(config))) == config


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_config_parses(path):
    load_config(path)


TWO = "data.train=[{path: a.jsonl, weight: 1}, {path: b.parquet, weight: 2.5}]"


def test_one_source_is_a_mapping_and_several_are_a_list(minimal):
    one, two = load_config(minimal), load_config(minimal, [TWO, "data.eval=null"])
    assert [source.path for source in one.data.train] == ["train.jsonl"] and len(one.data.eval) == 1
    assert [source.path for source in two.data.train] == ["a.jsonl", "b.parquet"] and two.data.eval == []
    assert load_config(minimal, ["data.train=[{path: train.jsonl}]"]) == one
    for config in (one, two):
        assert parse_config(yaml.safe_load(dump_config(config))) == config
    dumped = yaml.safe_load(dump_config(one))["data"], yaml.safe_load(dump_config(two))["data"]
    assert dumped[0]["train"]["path"] == "train.jsonl" and dumped[0]["eval"]["path"] == "eval.jsonl"
    assert [source["path"] for source in dumped[1]["train"]] == ["a.jsonl", "b.parquet"] and dumped[1]["eval"] is None


def test_overrides_reach_into_sources(minimal, tmp_path):
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(dump_config(load_config(minimal)))
    for path in (minimal, dumped):
        assert load_config(path, ["data.train.path=x.jsonl"]).data.train[0].path == "x.jsonl"
    two = load_config(minimal, [TWO, "data.train.1.path=c.jsonl", "data.train.0.weight=4"])
    assert [(source.path, source.weight) for source in two.data.train] == [("a.jsonl", 4), ("c.jsonl", 2.5)]
    assert load_config(minimal, ["data.eval=null", "data.eval.path=x"]).data.eval[0].path == "x"


def test_weights_are_of_several_sources(minimal):
    assert load_config(minimal).data.weights is None
    assert load_config(minimal, ["data.train.weight=3"]).data.weights is None
    assert load_config(minimal, [TWO]).data.weights == [1, 2.5]
    assert load_config(minimal, ["data.train=[{path: a}, {path: b}]"]).data.weights is None


@pytest.mark.parametrize(
    ("path", "given", "resolved"),
    [
        ("a.jsonl", "auto", "jsonl"),
        ("dir/a.JSON", "auto", "jsonl"),
        ("a.parquet", "auto", "parquet"),
        ("a.jsonl", "parquet", "parquet"),
        ("a.txt", "jsonl", "jsonl"),
        ("owner/name", "auto", "hub"),
        ("some/folder", "auto", "hub"),
    ],
)
def test_formats_follow_from_suffixes(minimal, path, given, resolved):
    [source] = load_config(minimal, [f"data.train={{path: {path}, format: {given}}}"]).data.train
    assert source.resolved_format == resolved


def test_overrides_reach_everywhere(minimal):
    config = load_config(minimal, ["trainer.zero_stage=0", "log.rollouts_every=5", "trainer.learning_rate=1e-4"])
    assert (config.trainer.zero_stage, config.log.rollouts_every, config.trainer.learning_rate) == (0, 5, 1e-4)


BAD = [
    ("trainer.zero_stag=2", "trainer.zero_stag", "zero_stage"),
    ("trianer.zero_stage=2", "trianer", "trainer"),
    ("objective.divergence.bta=1", "objective.divergence.bta", "beta"),
    ("trainer.batch_size=0", "trainer.batch_size", "greater than or equal to 1"),
    ("trainer.batch_size=many", "trainer.batch_size", "integer"),
    ("trainer.learning_rate=-1", "trainer.learning_rate", "greater than 0"),
    ("trainer.learning_rate=.nan", "trainer.learning_rate", "number"),
    ("trainer.zero_stage=4", "trainer.zero_stage", "less than or equal to 3"),
    ("trainer.lr_schedule=cosin", "trainer.lr_schedule", "cosine"),
    ("trainer.warmup_steps=4", "trainer.warmup_steps", "max_steps"),
    ("trainer=3", "trainer", "dictionary"),
    ("data.on_policy_fraction=1.5", "data.on_policy_fraction", "less than or equal to 1"),
    ("data.mixing=sometimes", "data.mixing", "per_step"),
    ("data.train=3", "data.train", "dictionary"),
    ("data.train=[]", "data.train", "at least 1 item"),
    ("data.train=null", "data.train", "at least 1 item"),
    ("data.train.pth=x", "data.train.pth", "path"),
    ("data.train.path=", "data.train.path", "at least 1 character"),
    ("data.train.format=csv", "data.train.format", "parquet"),
    ("data.train.weight=0", "data.train.weight", "greater than 0"),
    ("data.train.split=test", "data.train", "remove them"),
    ("data.train=[{path: a.jsonl}, {pth: b}]", "data.train.1.pth", "path"),
    ("data.train=[{path: a.jsonl}, {path: b, weight: -1}]", "data.train.1.weight", "greater than 0"),
    ("data.train=[{path: a, weight: 1}, {path: b}]", "data.train", "b has none: give all one, or none"),
    ("data.train.0.pth=x", "data.train.0", "known here"),
    ("data.eval.weight=2", "data.eval", "remove it"),
    ("data.overlong=cut", "data.overlong", "truncate"),
    ("data.chat_template_kwargs={tokenize: true}", "data.chat_template_kwargs", "gkd sets it itself"),
    ("rollout.temperature=0", "rollout.temperature", "greater than 0"),
    ("rollout.top_p=0", "rollout.top_p", "greater than 0"),
    ("objective.type=destill", "objective.type", "distill"),
    ("objective.divergence.type=kl", "objective.divergence.type", "forward_kl"),
    ("objective.divergence.beta=1.0", "objective.divergence.beta", "reverse_kl"),
    ("objective.divergence.beta=0", "objective.divergence.beta", "forward_kl"),
    ("objective.divergence={type: skew_forward_kl, alpha: 1}", "objective.divergence.alpha", "use 0.1"),
    ("objective.divergence={type: skew_reverse_kl, alpha: -0.1}", "objective.divergence.alpha", "less than 1"),
    ("objective.divergence={type: skew_reverse_kl, alpha: .nan}", "objective.divergence.alpha", "less than 1"),
    ("objective.divergence={type: adaptive_kl, head_mass: 1}", "objective.divergence.head_mass", "forward_kl"),
    ("objective.divergence={type: adaptive_kl, head_mass: 0}", "objective.divergence.head_mass", "reverse_kl"),
    ("objective.divergence={type: total_variation, alpha: 0.1}", "objective.divergence.alpha", "known here: type"),
    ("objective.divergence={type: adaptive}", "objective.divergence.type", "adaptive_kl"),
    ("objective.divergence={beta: 0.5}", "objective.divergence.type", "mapping with a `type`"),
    ("objective.reduction=mean", "objective.reduction", "token_mean"),
    ("teacher=null", "teacher", "add"),
    ("sync.every_steps=2", "sync.every_steps", "set every_steps to 1"),
    ("sync={every_steps: 4, max_staleness: 2}", "sync.every_steps", "at most 3"),
    ("student={model: a, init: random, lora: {}}", "student.init", "use pretrained"),
    ("student.lora={r: 1024}", "student.lora.r", "512 at most"),
    ("student.lora={dropout: 1}", "student.lora.dropout", "less than 1"),
    ("teacher={backend: student_base}", "teacher.backend", "add `student.lora"),
    ("teacher={name: a}", "teacher", "needs `model`"),
    ("trainer.num_ranks=9", "trainer.batch_size", "at least one"),
    ("trainer.offload=all", "trainer.offload", "at least 3"),
    ("rollout.samples_per_prompt=3", "trainer.batch_size", "multiple"),
    ("eval.best=divergence", "eval.best", "set eval.every_steps"),
    ("eval={every_steps: 2, best: divergence, metrics: [exact_match]}", "eval.best", "use one of exact_match"),
    ("eval={every_steps: 2, metrics: []}", "eval.metrics", "add exact_match"),
    ("eval.best=accuracy", "eval.best", "divergence"),
    ("objective={type: [a]}", "objective.type", "use one of: distill"),
    ("trainer.betas=[0.9, 1.5]", "trainer.betas.1", "less than 1"),
    ("eval.metrics=[nonsense]", "eval.metrics.0", "exact_match"),
    ("sync.backend=pigeon", "sync.backend", "object_store"),
    ("run.name=", "run.name", "at least 1 character"),
    ("run.seed=-1", "run.seed", "greater than or equal to 0"),
    ("nonsense", "override", "section.key=value"),
    ("run.name.first=x", "override", "not a section"),
    ("trainer.betas=[0.9, many]", "trainer.betas.1", "number"),
    ("student.lora.targets=[1]", "student.lora.targets.0", "string"),
]


@pytest.mark.parametrize(("override", "field", "cure"), BAD, ids=[case[0] for case in BAD])
def test_a_mistake_names_the_field_and_the_cure(minimal, override, field, cure):
    with refused(field, cure):
        load_config(minimal, [override])


def test_evaluation_needs_something_to_evaluate_on(minimal):
    with pytest.raises(UserError, match=r"add `data.eval") as caught:
        load_config(minimal, ["data.eval=null", "eval.every_steps=2"])
    assert caught.value.field == "eval.every_steps"


UNBUILT = [
    "teacher.signal=attention_relations",
    "teacher.signal=attention_relations",
    "rollout.max_restarts=1",
    "log.wandb=true",
]


@pytest.mark.parametrize("override", UNBUILT)
def test_what_is_not_built_is_refused_and_says_so(minimal, override):
    with pytest.raises(NotBuiltYet, match="not built yet") as caught:
        load_config(minimal, [override])
    assert override.split("=")[0].startswith(caught.value.field)


@pytest.mark.parametrize("key", ["data.train.path", "data.train.2.path", "data.train.-1.path"])
def test_an_entry_of_a_list_is_named_by_its_number(minimal, key):
    with pytest.raises(UserError, match=r"data.train is a list of 2.*data.train.0"):
        load_config(minimal, [TWO, f"{key}=x"])


def test_files_that_are_no_config(tmp_path):
    with pytest.raises(UserError, match=r"cannot be read: No such file or directory\. Give"):
        load_config(tmp_path / "absent.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("run: {name: tiny\nstudent: x")
    with pytest.raises(UserError, match="line 2"):
        load_config(broken)
    broken.write_text("just text")
    with pytest.raises(UserError, match="no mapping"):
        load_config(broken)


def test_the_config_imports_no_torch():
    code = "import sys, gkd.config; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
