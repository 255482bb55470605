"""Mistakes of `gkd export`, before anything is loaded; that it exports well is seen in tests/e2e/test_modes.py."""

import pytest
import yaml
from tiny import config_tree, save_model, write_records

from trainer import checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("export")
    student = save_model(root / "student", "llama")
    tree = config_tree(root / "run", student, student, write_records(root / "train.jsonl", 8))
    (root / "run").mkdir()
    (root / "run" / "config.yaml").write_text(yaml.safe_dump(tree))
    checkpoint.write(root / "run" / "checkpoints", 2, {"best": {"step": None}}, lambda folder: None, keep_last=3)
    (root / "empty").mkdir()
    (root / "unsaved").mkdir()
    (root / "unsaved" / "config.yaml").write_text(yaml.safe_dump(tree))
    (root / "full").mkdir()
    (root / "full" / "file").write_text("x")
    return root


@pytest.mark.parametrize(
    ("arguments", "field", "cure"),
    [
        (["empty", "out"], "RUN", "output_dir of a run"),
        (["unsaved", "out"], "RUN", "no complete checkpoint"),
        (["run", "out", "--step", "7"], "--step", "step_2"),
        (["run", "out", "--step", "best"], "--step", "eval.best"),
        (["run", "out", "--form", "adapter"], "--form", "Use full"),
        (["run", "full"], "OUTPUT", "another folder"),
        (["run", "full/file"], "OUTPUT", "another folder"),
    ],
)
def test_mistakes(run, arguments, field, cure, run_command_line):
    code, _, error = run_command_line("export", *(run / argument for argument in arguments[:2]), *arguments[2:])
    assert code == 2 and error.startswith(f"error: {field} = ")
    assert cure.replace(" ", "") in error.replace("\n", "").replace(" ", "")
    assert not (run / "out").exists()
