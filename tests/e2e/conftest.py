import io

import pytest
from rich.console import Console
from tiny import config_tree, read_lines, save_model, write_records

from gkd.config import parse_config
from launch.train import run_training


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """`models(architecture, **options)` is the folder of a tiny model, made once."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def get(architecture, **options):
        key = f"{architecture}-{'-'.join(f'{k}_{v}' for k, v in options.items())}"
        if key not in made:
            made[key] = save_model(root / key, architecture, **options)
        return made[key]

    return get


@pytest.fixture(scope="session")
def train_file(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("data") / "train.jsonl", 40)


@pytest.fixture
def train(tmp_path, models, train_file, ray_cluster):
    """`train(folder_name, {"section.key": value, "section": values})` runs `gkd train` in this process.

    It returns the metrics, the ledger and the run's folder.
    """

    def run(name="run", changes=None, *, student=None, teacher=None):
        tree = config_tree(tmp_path / name, student or models("qwen2"), teacher or models("llama", seed=1), train_file)
        for key, value in (changes or {}).items():
            section, _, rest = key.partition(".")
            if rest:
                tree.setdefault(section, {})[rest] = value
            else:
                tree[section] = value
        folder = tmp_path / name
        run_training(parse_config(tree), Console(file=io.StringIO()))
        return read_lines(folder / "metrics.jsonl"), read_lines(folder / "samples.jsonl"), folder

    return run
