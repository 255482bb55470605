import os
import sys
from pathlib import Path

# Ray's workers inherit the environment, not this process's sys.path.
os.environ["PYTHONPATH"] = str(Path(__file__).parent / "support")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# By default Ray's workers yield to everything else, and on a busy host those of a test would not be up in time.
os.environ.setdefault("RAY_worker_niceness", "0")

import pytest


@pytest.fixture(scope="session")
def ray_cluster():
    """One Ray for all tests that need it."""
    from launch.ray_session import ray_session

    with ray_session():
        yield


@pytest.fixture
def run_command_line(monkeypatch, capsys):
    """`run_command_line(verb, *arguments)` runs `gkd` in this process: (exit code, stdout, stderr)."""
    from launch import cli

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["gkd", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
