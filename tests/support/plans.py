"""A small config, sizes and records of a run that a plan is made from, without models."""

import json

from gkd.config import dump_config, parse_config
from gkd.signals import SignalKind
from launch.architecture import Architecture
from launch.memory import Sizes


def plan_config(**changes):
    """Two engines, two teachers and one rank; `changes` go into sections, a section None is left out."""
    tree = {
        "run": {"name": "a", "output_dir": "a"},
        "student": {"model": "a"},
        "teacher": {"model": "b", "dtype": "bfloat16", "sequences_per_batch": 3, "num_actors": 2},
        "data": {"train": {"path": "a.jsonl"}},
        "rollout": {"max_new_tokens": 10, "num_actors": 2},
        "objective": {"type": "distill", "divergence": {"type": "reverse_kl"}},
        "trainer": {"max_steps": 2, "batch_size": 8, "learning_rate": 1.0},
        "sync": {"max_staleness": 0},
    }
    for name, section in changes.items():
        if section is None:
            del tree[name]
        elif name in ("objective", "teachers"):
            tree[name] = section
        else:
            tree[name] = tree[name] | section
    return parse_config(tree)


def architecture(name, **changes):
    return Architecture(
        **{
            "recomputes": True,
            "name": name,
            "num_parameters": 1000,
            "largest_parameter": 300,
            "modules": frozenset(),
            "linear": {},
            "num_layers": 3,
            "hidden_size": 10,
            "intermediate_size": 20,
            "cache_numbers_per_token": 7,
        }
        | changes
    )


SIZES = Sizes(
    student=architecture("Student"),
    teachers=(architecture("Teacher", num_parameters=5000, hidden_size=20),),
    adapter=0,
    rows=100,
    signals=(SignalKind.FULL_LOGITS,),
    longest_prompt=6,
    longest_response=10,
    longest_scored_prompt=6,
    longest_scored_response=10,
    longest_written=0,
)

LINE = {
    "stage": 0, "sync/seconds": 1.0, "tokens/generated": 80, "tokens/trained": 80, "time/rollout_s": 4.0,
    "time/teacher_s": 6.0, "time/train_s": 2.0, "time/step_s": 10.0, "time/rollout_wait_s": 6.0,
    "time/teacher_wait_s": 7.0, "time/train_wait_s": 8.0,
}  # fmt: skip
"""A step of 8 sequences with 10 tokens each: 2 engines write for 4 s, 2 teachers score for 3 s, a rank trains for 2 s,
a sync takes 1 s."""


def write_run(folder, config, lines):
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
