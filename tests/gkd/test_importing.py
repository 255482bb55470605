from pathlib import Path

import pytest

from gkd.errors import UserError
from gkd.importing import absolute_path, load_object


def test_a_file_anywhere_is_imported_once(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import math\nvalue = object()\ndef half(x): return x / 2\n")
    path = f"{file}:half"
    assert load_object(path, field="x")(3) == 1.5
    assert load_object(f"{file}:value", field="x") is load_object(f"{file}:value", field="x")
    other = tmp_path / "elsewhere" / "mine.py"  # the same name in another folder is another module
    other.parent.mkdir()
    other.write_text("def half(x): return 0\n")
    assert load_object(f"{other}:half", field="x")(3) == 0


def test_a_relative_file_keeps_its_meaning_in_another_directory(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("value = 7\n")
    monkeypatch.chdir(tmp_path)
    path = absolute_path("mine.py:value")
    monkeypatch.chdir("/")
    assert load_object(path, field="x") == 7
    assert absolute_path("package.module:name") == "package.module:name"
    assert Path(path).is_absolute()


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("no_colon", "is not an import path"),
        ("absent.module:fn", "ModuleNotFoundError"),
        ("/nowhere/absent.py:fn", "FileNotFoundError"),
        ("broken_module:value", "NameError"),
        ("math:no_such_name", "has no 'no_such_name'"),
    ],
)
def test_what_cannot_be_imported_says_why(path, problem):
    with pytest.raises(UserError, match=problem):
        load_object(path, field="objective.divergence.path")


def test_a_file_that_fails_can_be_mended(tmp_path):
    file = tmp_path / "mended.py"
    file.write_text("value = undefined\n")
    with pytest.raises(UserError, match="undefined"):
        load_object(f"{file}:value", field="x")
    file.write_text("value = 1\n")
    assert load_object(f"{file}:value", field="x") == 1


def test_the_home_folder_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert absolute_path("~/mine.py:value") == f"{tmp_path / 'mine.py'}:value"
