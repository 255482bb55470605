"""Rules of this repository that a reader relies on."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("gkd", "rollout", "trainer", "launch")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MAY_IMPORT = {"gkd": {"gkd"}, "rollout": {"gkd", "rollout"}, "trainer": {"gkd", "trainer"}, "launch": set(PACKAGES)}


def imported(path):
    """Top-level names of everything that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_import_rule(path):
    relative = path.relative_to(ROOT)
    package, names = relative.parts[0], imported(path)
    assert names & set(PACKAGES) <= MAY_IMPORT[package]
    if "vllm" in names:
        assert package == "rollout" and (path.name.startswith("vllm_") or "weights" in relative.parts)
    if "deepspeed" in names:
        assert package == "trainer" and path.name.startswith("deepspeed_")
    if "ray" in names:
        assert package == "launch" or "actor" in path.name or "weights" in relative.parts


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_small_and_public_names_have_docstrings(path):
    assert path.name != "utils.py"
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 400
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a module says what it is for"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} needs a docstring"


@pytest.mark.parametrize(
    ("code", "forbidden"),
    [
        ("import gkd.config", ("torch", "transformers")),
        ("import launch.cli", ("torch", "transformers", "ray", "vllm")),
        ("import launch.check", ("vllm", "deepspeed")),
        ("import trainer.trainer_actor", ("vllm",)),
        ("import rollout.weights.object_store; import rollout.teacher_actor", ("vllm", "deepspeed")),
    ],
)
def test_what_an_import_must_not_pull_in(code, forbidden):
    check = f"import sys; {code}; sys.exit(', '.join(set({forbidden!r}) & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_vllm_plug_in_is_installed():
    from importlib.metadata import entry_points

    found = {point.name: point.value for point in entry_points(group="vllm.general_plugins")}
    assert found["gkd_object_store"] == "rollout.weights.object_store:register"
