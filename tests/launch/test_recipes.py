"""The shipped recipes pass the check on a host that has none of their models and data."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from gkd.config import load_config
from launch.check import run_check
from launch.placement import needed_places

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize(
    ("name", "num_gpus"), [("qwen3_8b_to_0.6b_8gpu", 8), ("qwen3_lora", 4), ("qwen3_two_nodes", 16)]
)
def test_a_recipe_passes_the_check_and_needs_what_its_header_says(name, num_gpus, tmp_path):
    path = CONFIGS / f"{name}.yaml"
    config = load_config(path, [f"run.output_dir={tmp_path}"])
    output = io.StringIO()
    run_check(config, Console(file=output, width=200), offline=True)
    assert f"{num_gpus} GPUs in all" in output.getvalue()
    assert f"{config.student.model!r} is not on this host" in output.getvalue()
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"gkd train configs/{name}.yaml" in header and "NOT been run" in header and "arXiv" in header
    counts = {place.worker: 0 for place in needed_places(config)}
    for place in needed_places(config):
        counts[place.worker] += 1
    for worker, word in (("trainer", "training rank"), ("rollout", "rollout engine"), ("teacher", "teacher")):
        assert f"{counts[worker]} {word}" in header


def test_the_recipe_on_plain_text_passes_the_check(tmp_path):
    path = CONFIGS / "truncate" / "text.yaml"
    output = io.StringIO()
    config = load_config(path, [f"run.output_dir={tmp_path}"])
    run_check(config, Console(file=output, width=200), offline=True)
    assert "'Qwen/Qwen3-0.6B' is not on this host" in output.getvalue()
    assert (config.needs_engine, config.needs_teacher) == (False, False)
    command = next(line.strip("# ") for line in path.read_text().splitlines() if "objective={" in line)
    distill = [f"run.output_dir={tmp_path}", "data.on_policy_fraction=0", *command.replace("'", "").split(" ", 1)]
    run_check(load_config(path, distill), Console(file=output, width=200), offline=True)


def test_every_recipe_is_tried():
    assert len(list(CONFIGS.glob("*.yaml"))) == 3


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("examples/*.yaml")), ids=lambda path: path.stem)
def test_an_example_passes_the_check_once_its_data_is_there(path, tmp_path, monkeypatch):
    """From the repository's folder, where its header's commands run: plug-ins are named by relative paths."""
    monkeypatch.chdir(CONFIGS.parent)
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "1+2=", "completion": "03"}\n')
    tree = re.sub(r"outputs/quickstart/data/\w+\.jsonl", str(data), path.read_text())
    here = tmp_path / path.name
    here.write_text(tree.replace("outputs/quickstart/", f"{tmp_path}/absent/"))  # whether the quickstart was run or not
    output = io.StringIO()
    config = load_config(here, [f"run.output_dir={tmp_path}"])
    run_check(config, Console(file=output, width=400), offline=True)
    assert f"teacher.model = '{tmp_path}/absent/teacher/export' is not on this host" in output.getvalue()
    assert f"gkd train configs/examples/{path.name}" in path.read_text()
