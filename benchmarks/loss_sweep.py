"""Time and memory of the loss over vocabularies and batch sizes: some tokens at a time, all at once, and as Liger does.

    python -m benchmarks.loss_sweep
    python -m benchmarks.loss_sweep --device cuda --output outputs/bench/loss_cuda.json

Every point is `benchmarks/loss.py` in a process of its own, the generalised JSD with both heads (width 256) and their
gradients. Before it counts, some tokens go through; on GPUs, and with Liger, whose loss is compiled for its sizes, as
many as count. Of small points the median of three counts. It writes the points and a plot beside them, and prints the
table of docs/PERFORMANCE.md.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import psutil
import torch
import typer

from benchmarks.loss import Way
from benchmarks.record import machine, markdown, panels, publish

Device = Literal["cpu", "cuda"]
Found = dict[str, Any]

TITLES: dict[Way, str] = {"chunked": "chunked", "naive": "naive", "liger": "Liger"}
MOST_ELEMENTS = 152_000 * 8_192
"""V x T of the largest points."""
GRID: dict[Device, dict[int, tuple[int, ...]]] = {
    "cpu": {2_048: (1_024, 8_192, 32_768), 32_000: (1_024, 8_192), 152_000: (1_024, 8_192), 256_000: (1_024,)},
    "cuda": dict.fromkeys((2_048, 32_000, 152_000, 256_000), (1_024, 4_096, 8_192, 32_768)),
}
"""Vocabulary -> tokens. On CPUs so few that all of it takes minutes."""
MOST_LIGER_ELEMENTS: dict[Device, int] = {"cpu": 2**28, "cuda": MOST_ELEMENTS}
"""V x T that Liger is run with, at most: it takes every point twice."""
NAIVE_TENSORS = 3
"""Float32 tensors [T, V] that the naive way holds at once: the logits of both, and their gradient."""
WIDTH = 256
WARM_UP_ELEMENTS = 2**25
"""V x T that go through before what counts (1,048 tokens at V = 32,000): more than `gkd.logits` makes at once, so that
a point that is made in chunks is warmed up in chunks."""
REPEATED_ELEMENTS = 2**26
"""V x T of the largest points that are measured three times: on CPUs they take a few seconds each."""
MOST_DISAGREEMENT = 1e-3
"""Of the divergences that different ways find, relative: more would mean that they compute different things."""
_LOSS = Path(__file__).with_name("loss.py")


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement."""

    vocab: int
    tokens: int
    way: Way

    @property
    def elements(self) -> int:
        """V x T."""
        return self.vocab * self.tokens


def points(device: Device) -> list[Point]:
    """What is measured, the ways of a size one after the other."""
    grid = ((vocab, tokens) for vocab, column in GRID[device].items() for tokens in column)
    return [Point(*size, way) for size in grid if size[0] * size[1] <= MOST_ELEMENTS for way in TITLES]


def measure(device: Device) -> Found:
    """Measure every point.

    Returns:
        `points`: for each, its sizes, its way, and either what `benchmarks/loss.py` says or `left_out`, the reason why
        it was not run. `machine`: where. `left_out`: way -> why all of it was left out.

    Raises:
        RuntimeError: if a measurement fails.
        ValueError: if two ways find different divergences.
    """
    wanted = points(device)
    rows: list[Found] = []
    refused: dict[str, str] = {}
    for number, point in enumerate(wanted, 1):
        print(
            f"{number}/{len(wanted)}: V = {point.vocab:,}, {point.tokens:,} tokens, {point.way}: ", end="", flush=True
        )
        result = _measured(point, device, refused)
        rows.append({"vocab": point.vocab, "tokens": point.tokens, "way": point.way} | result)
        print(result.get("left_out") or f"{result['seconds']:.2f} s, {result['peak_extra_bytes'] / 1e9:.2f} GB")
    _check(rows)
    gpu = {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}
    return {"points": rows, "machine": machine() | gpu, "left_out": refused, "width": WIDTH}


def _measured(point: Point, device: Device, refused: dict[str, str]) -> Found:
    """The result of a point, or why there is none; what a way says that cannot run here goes into `refused`."""
    if point.way in refused:
        return {"left_out": "cannot run here"}
    if point.way == "naive" and 4 * NAIVE_TENSORS * point.elements > _room_bytes(device):
        return {"left_out": "does not fit"}
    if point.way == "liger" and point.elements > MOST_LIGER_ELEMENTS[device]:
        return {"left_out": "not measured"}
    done = subprocess.run(_command(point, device), capture_output=True, text=True, check=False)
    if done.returncode == 2 and point.way == "liger":
        refused[point.way] = done.stderr.strip()
        return {"left_out": "cannot run here"}
    if done.returncode:
        raise RuntimeError(f"{point} ended with code {done.returncode}:\n{done.stderr}")
    result: Found = json.loads(done.stdout.splitlines()[-1])
    return result


def _command(point: Point, device: Device) -> list[str]:
    options = {
        "vocab": point.vocab,
        "tokens": point.tokens,
        "way": point.way,
        "device": device,
        "student-width": WIDTH,
        "teacher-width": WIDTH,
        "warm-up": _warm_up_tokens(point, device),
        "repeat": 3 if point.elements <= REPEATED_ELEMENTS else 1,
    }
    return [sys.executable, str(_LOSS), "--json", *(f"--{name}={value}" for name, value in options.items())]


def _warm_up_tokens(point: Point, device: Device) -> int:
    if point.way == "liger" or device == "cuda":
        return point.tokens
    return min(point.tokens, WARM_UP_ELEMENTS // point.vocab)


def _room_bytes(device: Device) -> float:
    return torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available


def _check(rows: Sequence[Mapping[str, Any]]) -> None:
    """The ways of a size compute one number."""
    first: dict[tuple[int, int], Mapping[str, Any]] = {}
    for row in (row for row in rows if "divergence" in row):
        other = first.setdefault((row["vocab"], row["tokens"]), row)
        if abs(row["divergence"] - other["divergence"]) > MOST_DISAGREEMENT * abs(other["divergence"]):
            raise ValueError(f"{other['way']} and {row['way']} compute different things: {other} and {row}")


def table(found: Found) -> list[str]:
    """Lines of markdown: a row for each size, seconds and GB of each way, and what was left out."""
    ways = [way for way in TITLES if way not in found["left_out"]]
    head = ["V", "tokens", *(f"{TITLES[way]}, s" for way in ways), *(f"{TITLES[way]}, GB" for way in ways)]
    rows = []
    sizes: dict[tuple[int, int], Found] = {}
    for row in found["points"]:
        sizes.setdefault((row["vocab"], row["tokens"]), {})[row["way"]] = row
    for (vocab, tokens), of in sizes.items():
        seconds = [of[way].get("left_out") or f"{of[way]['seconds']:.2f}" for way in ways]
        memory = [of[way].get("left_out") or f"{of[way]['peak_extra_bytes'] / 1e9:.2f}" for way in ways]
        rows.append([f"{vocab:,}", f"{tokens:,}", *seconds, *memory])
    return markdown(head, rows) + [
        f"\n{TITLES[way]} is left out: {reason}" for way, reason in found["left_out"].items()
    ]


def plot(found: Found, path: Path) -> None:
    """Seconds and peak bytes over the tokens: a colour for each vocabulary, a style for each way."""
    styles: dict[Way, str] = {"chunked": "o-", "naive": "s--", "liger": "^:"}
    measured = [row for row in found["points"] if "left_out" not in row]
    colours = {vocab: f"C{place}" for place, vocab in enumerate(dict.fromkeys(row["vocab"] for row in measured))}
    labels = {"seconds": "seconds, forward and backward", "peak_extra_bytes": "peak bytes over those held before"}
    with panels(path, 2, width=6) as axes:
        for panel, (key, label) in zip(axes, labels.items(), strict=True):
            for vocab, colour in colours.items():
                for way, style in styles.items():
                    line = [(row["tokens"], row[key]) for row in measured if (row["vocab"], row["way"]) == (vocab, way)]
                    if line:
                        panel.plot(*zip(*line, strict=True), style, color=colour, label=f"V = {vocab:,}, {TITLES[way]}")
            panel.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
            panel.grid(alpha=0.3)
        axes[0].legend(fontsize="small", ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))


def main(
    device: Annotated[Device, typer.Option(help="Where the loss runs.")] = "cpu",
    output: Annotated[Path, typer.Option(help="JSON file of the points; the plot goes beside it.")] = Path(
        "outputs/bench/loss.json"
    ),
) -> None:
    """Measure the loss over vocabularies and batch sizes."""
    publish(measure(device), output, table=table, plot=plot)


if __name__ == "__main__":
    typer.run(main)
