import subprocess
import sys
from pathlib import Path

import pytest
import yaml

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
    assert config.sync.max_logprob_gap == 1e-3
    assert parse_config(yaml.safe_load(dump_config(config))) == config


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_config_parses(path):
    load_config(path)


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
    ("rollout.temperature=0", "rollout.temperature", "greater than 0"),
    ("rollout.top_p=0", "rollout.top_p", "greater than 0"),
    ("objective.type=destill", "objective.type", "distill"),
    ("objective.divergence.type=kl", "objective.divergence.type", "forward_kl"),
    ("objective.divergence.beta=1.0", "objective.divergence.beta", "reverse_kl"),
    ("objective.divergence.beta=0", "objective.divergence.beta", "forward_kl"),
    ("objective.reduction=mean", "objective.reduction", "token_mean"),
    ("teacher=null", "teacher", "add"),
    ("sync.every_steps=2", "sync.every_steps", "set every_steps to 1"),
    ("objective={type: [a]}", "objective.type", "mapping"),
    ("trainer.betas=[0.9, 1.5]", "trainer.betas.1", "less than 1"),
    ("eval.metrics=[nonsense]", "eval.metrics.0", "exact_match"),
    ("sync.backend=pigeon", "sync.backend", "object_store"),
    ("run.name=", "run.name", "at least 1 character"),
    ("run.seed=-1", "run.seed", "greater than or equal to 0"),
    ("nonsense", "override", "section.key=value"),
    ("run.name.first=x", "override", "not a section"),
]


@pytest.mark.parametrize(("override", "field", "cure"), BAD, ids=[case[0] for case in BAD])
def test_a_mistake_names_the_field_and_the_cure(minimal, override, field, cure):
    with pytest.raises(UserError) as caught:
        load_config(minimal, [override])
    assert caught.value.field == field
    assert cure.lower() in str(caught.value).lower()


UNBUILT = [
    "student.lora.r=4",
    "student.init=truncate",
    "teachers=[{name: a, model: b}]",
    "teacher.backend=vllm",
    "teacher.signal=top_k",
    "teacher.signal=attention_relations",
    "teacher.num_actors=2",
    "data.overlong=truncate",
    "rollout.num_actors=2",
    "rollout.samples_per_prompt=2",
    "rollout.tensor_parallel_size=2",
    "rollout.max_restarts=1",
    "objective.type=moment_matching",
    "objective.divergence.type=total_variation",
    "reward.path=a:b",
    "trainer.num_ranks=2",
    "trainer.zero_stage=3",
    "trainer.dtype=bfloat16",
    "sync.backend=nccl",
    "sync.max_staleness=1",
    "eval.every_steps=5",
    "log.tensorboard=true",
    "stages=[{}]",
]


@pytest.mark.parametrize("override", UNBUILT)
def test_what_is_not_built_is_refused_and_says_so(minimal, override):
    with pytest.raises(NotBuiltYet, match="not built yet") as caught:
        load_config(minimal, [override])
    assert override.split("=")[0].startswith(caught.value.field)


def test_files_that_are_no_config(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
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
