"""The benchmark of the loss: every way and every device computes the same number, and its table says what was run."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import loss_sweep
from benchmarks.loss_sweep import GRID, MOST_ELEMENTS, Point, measure, plot, points, table
from gkd import logits

ROOT = Path(__file__).resolve().parents[1]
LIGER = importlib.util.find_spec("liger_kernel") is not None
with_liger = pytest.mark.skipif(not LIGER, reason="liger-kernel is not installed")


def run_loss(*, vocab, tokens, way, device):
    """The object on the last line of `benchmarks/loss.py`."""
    sizes = [f"--vocab={vocab}", f"--tokens={tokens}", "--student-width=16", "--teacher-width=24"]
    command = [sys.executable, "benchmarks/loss.py", *sizes, f"--way={way}", f"--device={device}", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def found(**changes):
    """What a sweep of one size found: seconds and bytes are made up."""
    rows = [
        {"vocab": 3000, "tokens": 1024, "way": way, "seconds": seconds, "peak_extra_bytes": 2e9, "divergence": 0.2}
        for way, seconds in (("chunked", 1.0), ("naive", 4.0), ("liger", 1.5))
    ]
    return {"points": rows, "left_out": {}} | changes


@pytest.mark.parametrize("device", GRID)
def test_the_points_are_of_the_asked_sizes(device):
    sizes = {(point.vocab, point.tokens) for point in points(device)}
    assert {vocab for vocab, _ in sizes} == {2_048, 32_000, 152_000, 256_000}
    assert (152_000, 8_192) in sizes
    assert all(1_024 <= tokens <= 32_768 and vocab * tokens <= MOST_ELEMENTS for vocab, tokens in sizes)
    assert len(points(device)) == 3 * len(sizes)


def test_the_table_has_a_row_for_each_size():
    head, rule, row = table(found())
    assert head == "| V | tokens | chunked, s | naive, s | Liger, s | chunked, GB | naive, GB | Liger, GB |"
    assert rule.count("|") == head.count("|")
    assert row == "| 3,000 | 1,024 | 1.00 | 4.00 | 1.50 | 2.00 | 2.00 | 2.00 |"


def test_the_table_says_what_was_not_run():
    rows = found()["points"]
    rows[1] = {"vocab": 3000, "tokens": 1024, "way": "naive", "left_out": "does not fit"}
    rows[2] = {"vocab": 3000, "tokens": 1024, "way": "liger", "left_out": "cannot run here"}
    *_, row, reason = table(found(points=rows, left_out={"liger": "it is not installed"}))
    assert row == "| 3,000 | 1,024 | 1.00 | does not fit | 2.00 | does not fit |"
    assert reason == "\nLiger is left out: it is not installed"


def test_the_plot_is_a_picture_even_of_a_way_that_never_ran(tmp_path):
    rows = found()["points"][:2]
    plot(found(points=rows, left_out={"liger": "it is not installed"}), tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_ways_that_find_different_divergences_are_no_comparison():
    rows = found()["points"]
    rows[2]["divergence"] = 0.21
    with pytest.raises(ValueError, match="chunked and liger compute different things"):
        loss_sweep._check(rows)


def test_a_naive_point_that_does_not_fit_is_not_run(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_args, **_options: pytest.fail("it was run"))
    monkeypatch.setattr(loss_sweep, "_room_bytes", lambda device: 14e9)
    point = Point(152_000, 8_192, "naive")
    assert loss_sweep._measured(point, "cpu", {}) == {"left_out": "does not fit"}


def test_what_warms_a_point_up_takes_the_path_that_is_measured():
    for point in points("cpu"):
        warm_up = loss_sweep._warm_up_tokens(point, "cpu")
        at_once, warmed_up_at_once = (
            logits.tokens_at_once(tokens, point.vocab, "cpu") for tokens in (point.tokens, warm_up)
        )
        assert warm_up <= point.tokens and warmed_up_at_once == at_once, point
    assert {loss_sweep._warm_up_tokens(point, "cuda") - point.tokens for point in points("cuda")} == {0}


def test_a_sweep_measures_every_point_in_a_process_of_its_own(monkeypatch):
    """The rows are many enough to be chunked. Liger's loss is compiled, which takes long: it has a test of its own."""
    monkeypatch.setitem(GRID, "cpu", {4_500: (1_024,)})
    monkeypatch.setattr(loss_sweep, "WIDTH", 8)
    monkeypatch.setattr(loss_sweep, "TITLES", {"chunked": "chunked", "naive": "naive"})
    chunked, naive = measure("cpu")["points"]
    assert (chunked["way"], naive["way"]) == ("chunked", "naive")
    assert chunked["divergence"] == pytest.approx(naive["divergence"], rel=1e-5)
    assert chunked["peak_extra_bytes"] > 0 and naive["peak_extra_bytes"] > 0


def test_a_way_that_cannot_run_says_so_and_ends_with_code_2(monkeypatch, tmp_path):
    """Whether or not liger-kernel is installed: one that cannot be imported is found first."""
    missing = "No module named 'liger_kernel'"
    (tmp_path / "liger_kernel.py").write_text(f"raise ModuleNotFoundError({missing!r})\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setitem(GRID, "cpu", {300: (1_024, 2_048)})
    monkeypatch.setattr(loss_sweep, "TITLES", {"liger": "Liger"})
    measured = measure("cpu")
    assert [point["left_out"] for point in measured["points"]] == ["cannot run here"] * 2
    assert missing in measured["left_out"]["liger"]


@pytest.mark.slow
@with_liger
def test_liger_computes_the_same_number():
    size = {"vocab": 300, "tokens": 1_200, "device": "cpu"}
    ours, theirs = (run_loss(**size, way=way)["divergence"] for way in ("chunked", "liger"))
    assert theirs == pytest.approx(ours, rel=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["chunked", "naive", pytest.param("liger", marks=with_liger)])
def test_a_gpu_computes_the_same_number(way):
    """Two chunks of a GPU, and many of a CPU; float32 products, no TF32."""
    size = {"vocab": 4_000, "tokens": 1_500}
    assert size["vocab"] * size["tokens"] > logits._DIRECT
    cpu = run_loss(**size, way="chunked", device="cpu")
    gpu = run_loss(**size, way=way, device="cuda")
    assert gpu["divergence"] == pytest.approx(cpu["divergence"], rel=1e-4)
    assert "cpu" not in gpu["device"] and gpu["peak_extra_bytes"] > 0
