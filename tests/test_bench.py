"""`make bench`: what it keeps of its parts, and the syncs that it takes from the timelines of runs."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer

from benchmarks import __main__ as bench
from benchmarks import sync_runs
from gkd.config import parse_config

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("way", sync_runs.WAYS)
def test_the_config_of_every_way_of_syncing_is_one(way, tmp_path):
    config = parse_config(sync_runs.config_tree(way, tmp_path))
    assert config.log.trace and config.sync.max_staleness == 0
    assert (config.student.lora is not None) == ("LoRA" in way)
    assert config.trainer.num_ranks == (2 if "2 ranks" in way else 1)


def lane(number, name):
    """The event that names a lane."""
    return {"name": "thread_name", "ph": "M", "tid": number, "args": {"name": name}}


def interval(number, name, begin_s, seconds):
    """An event of a lane."""
    return {"name": name, "ph": "X", "tid": number, "ts": int(begin_s * 1e6), "dur": int(seconds * 1e6), "args": {}}


def test_the_parts_of_a_sync_are_each_taken_from_one_lane():
    """The engine and the driver both call something a probe, and every rank gathers: one of them each is counted."""
    driver, rank_0, rank_1, engine = 4001, 4010, 4011, 1000
    events = [
        lane(driver, "weight sync"), lane(rank_0, "rank 0"), lane(rank_1, "rank 1"), lane(engine, "rollout 0"),
        interval(driver, "sync", 10, 3), interval(driver, "transfer", 10, 2), interval(driver, "probe", 12, 0.5),
        interval(driver, "proof", 12.5, 0.25), interval(engine, "load bucket", 10.5, 0.5),
        interval(engine, "load bucket", 11, 0.25), interval(engine, "finish update", 11.5, 0.125),
        interval(engine, "probe", 12, 0.4), interval(rank_0, "gather", 10, 0.5), interval(rank_1, "gather", 10, 0.5),
        interval(driver, "sync", 20, 1), interval(rank_0, "gather", 22, 7), interval(engine, "load bucket", 20, 1),
    ]  # fmt: skip
    first, second = sync_runs.sync_parts(events)
    assert first == {
        "sync_s": 3, "transfer_s": 2, "gather_s": 0.5, "load_s": 0.875, "probe_s": 0.5, "proof_s": 0.25,
    }  # fmt: skip
    assert second == {"sync_s": 1, "transfer_s": 0, "gather_s": 0, "load_s": 1, "probe_s": 0, "proof_s": 0}
    head, _, row = sync_runs.table([{"way": "all weights", "bytes": 2e6} | first])
    assert row == "| all weights | 2.0 | 3.000 | 2.000 | 0.500 | 0.875 | 0.500 | 0.250 |"
    assert head.count("|") == row.count("|")


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Parts that measure a number each, in the place of the real ones; None has a part fail."""
    numbers = {"drawn": 1, "broken": None, "plain": 3}

    def run(command, *, check):
        assert command[5:] == (["--device=cuda"] if command[4].endswith("_cuda.json") else [])
        part, output = command[2].removeprefix("benchmarks."), Path(command[4])
        if numbers[part] is None:
            output.write_text("not whole", encoding="utf-8")
            return SimpleNamespace(returncode=1)
        output.write_text(json.dumps({"number": numbers[part]}), encoding="utf-8")
        return SimpleNamespace(returncode=0)

    def table(found):
        return [f"| {found['number']} |"]

    def plot(found, path):
        path.write_text(f"a picture of {found['number']}", encoding="utf-8")

    monkeypatch.setattr(bench.subprocess, "run", run)
    monkeypatch.setattr(bench, "PARTS", {"cpu": ("drawn", "broken", "plain"), "cuda": ("plain_cuda",)})
    for part in ("drawn", "broken", "plain"):
        monkeypatch.setitem(sys.modules, f"benchmarks.{part}", SimpleNamespace(table=table, plot=plot))
    places = {"FOLDER": "out", "SUMMARY": "out/summary.json", "RECORD": "record.json"}
    for name, path in (places | {"PAGE": "docs/page.md", "PLOTS": "docs/bench"}).items():
        monkeypatch.setattr(bench, name, tmp_path / path)
    bench.PAGE.parent.mkdir()
    bench.PAGE.write_text(
        "\n".join(f"<!-- {part}: begin -->\nold\n<!-- {part}: end -->\n" for part in (*numbers, "plain_cuda"))
    )
    return numbers


def kept(path):
    """Part -> the number in a summary."""
    return {part: measured["found"]["number"] for part, measured in json.loads(path.read_text())["parts"].items()}


def test_a_part_that_fails_costs_the_others_nothing_and_is_named(parts, capsys):
    bench.FOLDER.mkdir()
    (bench.FOLDER / "broken.json").write_text("of another time")
    with pytest.raises(typer.Exit) as ended:
        bench.main(part=None, device="cpu", keep=True)
    assert ended.value.exit_code == 1 and "failed: broken\n" in capsys.readouterr().out
    assert kept(bench.SUMMARY) == kept(bench.RECORD) == {"drawn": 1, "plain": 3}
    assert not (bench.FOLDER / "broken.json").exists(), "no other part can take it for new"


def test_what_is_known_is_written_before_the_next_part(parts, monkeypatch):
    run_part = bench.run_part

    def stopped(part):
        if part == "plain":
            raise KeyboardInterrupt
        return run_part(part)

    monkeypatch.setattr(bench, "run_part", stopped)
    with pytest.raises(KeyboardInterrupt):
        bench.main(part=None, device="cpu", keep=False)
    assert kept(bench.SUMMARY) == {"drawn": 1}


def test_recording_one_part_keeps_what_is_recorded_of_the_others(parts):
    """Also where they were never measured here, and without the minutes that they took."""
    bench.RECORD.write_text(json.dumps({"parts": {part: {"found": {"number": 7}} for part in parts}}))
    bench.main(part=["plain"], device="cpu", keep=True)
    assert kept(bench.RECORD) == {"drawn": 7, "broken": 7, "plain": 3}
    assert kept(bench.SUMMARY) == {"plain": 3}
    parts["drawn"] = 2
    bench.main(part=["drawn"], device="cpu", keep=False)
    assert kept(bench.SUMMARY) == {"plain": 3, "drawn": 2}
    assert kept(bench.RECORD) == {"drawn": 7, "broken": 7, "plain": 3}
    parts["drawn"] = 4
    bench.main(part=["plain"], device="cpu", keep=True)
    assert kept(bench.RECORD) == {"drawn": 7, "broken": 7, "plain": 3}, "what was measured before is not recorded"


def test_the_page_has_a_parts_plot_above_its_table(parts):
    bench.main(part=["drawn", "plain"], device="cpu", keep=True)
    page = bench.PAGE.read_text()
    assert "<!-- drawn: begin -->\n![drawn](bench/drawn.png)\n\n| 1 |\n<!-- drawn: end -->\n" in page
    assert "<!-- broken: begin -->\nold\n<!-- broken: end -->\n" in page, "it was not measured"
    assert (bench.PAGE.parent / "bench/drawn.png").read_text() == "a picture of 1"


def test_a_gpu_has_parts_of_its_own_beside_the_others(parts):
    bench.main(part=["plain"], device="cpu", keep=True)
    parts["plain"] = 5
    bench.main(part=None, device="cuda", keep=True)
    assert kept(bench.SUMMARY) == kept(bench.RECORD) == {"plain": 3, "plain_cuda": 5}
    page = bench.PAGE.read_text()
    assert "<!-- plain_cuda: begin -->\n![plain_cuda](bench/plain_cuda.png)\n\n| 5 |\n" in page
    with pytest.raises(typer.BadParameter, match="drawn is no part on cuda: use some of plain_cuda"):
        bench.main(part=["drawn"], device="cuda", keep=False)


@pytest.mark.parametrize("part", [part for device in bench.PARTS.values() for part in device])
def test_the_page_says_what_is_recorded(part):
    """Every part has its place; what was measured stands there to the digit, and its picture is there."""
    page = (ROOT / "docs/PERFORMANCE.md").read_text(encoding="utf-8")
    [shown] = re.findall(f"<!-- {part}: begin -->\n(.*?)<!-- {part}: end -->", page, flags=re.DOTALL)
    recorded = json.loads((ROOT / "benchmarks/results/bench.json").read_text(encoding="utf-8"))["parts"]
    if part not in recorded:
        assert shown == "Not measured yet.\n"
        return
    assert shown.splitlines() == bench.lines_of(part, recorded[part]["found"])
    assert (ROOT / f"docs/bench/{part}.png").exists()
