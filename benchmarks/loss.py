"""Time and memory of a distillation loss over a large vocabulary, both heads and their gradients included.

    python benchmarks/loss.py --vocab 152000 --tokens 8192 --json

The last line of `--json` is one object: `seconds` (forward and backward), `peak_extra_bytes` (the most memory that the
process held during it, over what it held before; the gradients of the head and of the hidden states count) and
`divergence` (the mean per token). `--way naive` makes the logits of all tokens at once, as most trainers do; the
divergence is ours all the same. `--way liger` is the chunked loss of liger-kernel with its defaults, of which one is to
compile: warm it up with as many tokens as are measured.
"""

import ctypes
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch._dynamo  # torch's checkpointing imports it when it is first used: a second and 150 MB that are no loss's
import typer

from gkd.config.divergence import DivergenceConfig, GeneralizedJsd
from gkd.head_linear import LinearHead
from gkd.logits import HeadLogits
from gkd.objectives import Distill, ObjectiveInputs, build_divergence
from gkd.teacher_view import WholeView

_LOOK_EVERY_S = 0.002
Way = Literal["chunked", "naive", "liger"]


def main(
    vocab: Annotated[int, typer.Option(help="Rows of both heads.")] = 32_000,
    tokens: Annotated[int, typer.Option(help="Response tokens of the batch.")] = 2_048,
    student_width: Annotated[int, typer.Option(help="Hidden width of the student.")] = 1_024,
    teacher_width: Annotated[int, typer.Option(help="Hidden width of the teacher.")] = 1_024,
    divergence: Annotated[str, typer.Option(help="Type of the divergence.")] = "generalized_jsd",
    way: Annotated[Way, typer.Option(help="Some tokens at a time, all at once, or as liger-kernel does.")] = "chunked",
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where it runs.")] = "cpu",
    warm_up: Annotated[int, typer.Option(help="Tokens of a run before those that count.")] = 0,
    repeat: Annotated[int, typer.Option(help="Runs, of which the median counts.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object on a line of its own.")] = False,
) -> None:
    """Measure one loss."""
    loss = _loss(way, divergence)
    torch.manual_seed(0)
    place = torch.device(device)
    student, teacher = (_model(tokens, vocab, width, place) for width in (student_width, teacher_width))
    student[0].requires_grad_()
    teacher[1].requires_grad_(False)
    objective = Distill(divergence=_divergence(divergence), temperature=1.0)
    if warm_up:
        few = slice(0, min(warm_up, tokens))
        loss(objective, (student[0][few], student[1]), (teacher[0][few], teacher[1])).backward()
    results = []
    for _ in range(repeat):
        student[0].grad = student[1].weight.grad = None
        with peak_memory(place) as peak:
            start = time.perf_counter()
            mean = loss(objective, student, teacher)
            mean.backward()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        results.append({"seconds": seconds, "peak_extra_bytes": peak(), "divergence": mean.item()})
    middle = sorted(results, key=lambda result: result["seconds"])[len(results) // 2]
    shape = {"vocab": vocab, "tokens": tokens, "student_width": student_width, "teacher_width": teacher_width}
    print(
        f"{divergence}, {way}, {tokens} tokens, V = {vocab}: {middle['seconds']:.2f} s, "
        f"{middle['peak_extra_bytes'] / 2**30:.2f} GiB more than before, {middle['divergence']:.6f} nats per token"
    )
    if as_json:
        print(json.dumps(middle | shape | {"way": way, "type": divergence, "device": _name(place)}))


def _model(tokens: int, vocab: int, width: int, device: torch.device) -> "Model":
    """Random, with logits of about unit size; drawn on the CPU, so that every device computes the same number."""
    head = torch.nn.utils.skip_init(torch.nn.Linear, width, vocab, bias=False)
    torch.nn.init.normal_(head.weight, std=width**-0.5)
    return torch.randn(tokens, width).to(device), head.to(device)


Model = tuple[torch.Tensor, torch.nn.Linear]
"""Hidden states [T, H] and a head."""
Loss = Callable[[Distill, Model, Model], torch.Tensor]
"""Mean divergence per token, from an objective, the student and the teacher."""


def _loss(way: Way, divergence: str) -> Loss:
    """The way's loss; ends the process with code 2 where it cannot run."""
    if way != "liger":
        return {"chunked": _chunked, "naive": _naive}[way]
    refusal = "" if divergence == "generalized_jsd" else f"it has generalized_jsd, and {divergence} was asked for"
    try:
        import liger_kernel.chunked_loss  # noqa: F401
    except ImportError as error:
        refusal = f"{error}; `pip install -e .[bench]` installs it"
    if refusal:
        print(f"--way liger cannot run: {refusal}", file=sys.stderr)
        raise typer.Exit(2)
    return _liger


def _naive(objective: Distill, student: Model, teacher: Model) -> torch.Tensor:
    """Mean divergence per token, out of the logits [T, V] of both."""
    student_TV, teacher_TV = (head(hidden_TH) for hidden_TH, head in (student, teacher))
    return objective.divergence(student_TV, teacher_TV).mean()


def _chunked(objective: Distill, student: Model, teacher: Model) -> torch.Tensor:
    """Mean divergence per token, as the trainer computes it."""
    tokens, device = len(student[0]), student[0].device
    inputs = ObjectiveInputs(
        student=_lazy(student),
        num_rows=student[1].out_features,
        teacher=WholeView(_lazy(teacher)),
        response_ids_T=torch.zeros(tokens, dtype=torch.long, device=device),
        mask_T=torch.ones(tokens, dtype=torch.bool, device=device),
        loss_weights_T=torch.full((tokens,), 1 / tokens, device=device),
        lengths=(tokens,),
        on_policy_N=torch.ones(1, dtype=torch.bool, device=device),
    )
    return objective(inputs).loss_T.mean()


def _liger(objective: Distill, student: Model, teacher: Model) -> torch.Tensor:
    """Mean generalised JSD per token, as liger-kernel computes it. Its labels weigh nothing, and none is ignored."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    beta = GeneralizedJsd(type="generalized_jsd").beta
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, temperature=objective.temperature
    )
    labels_T = torch.zeros(len(student[0]), dtype=torch.long, device=student[0].device)
    mean: torch.Tensor = loss(student[0], student[1].weight, teacher[0], teacher[1].weight, labels_T)
    return mean


def _lazy(model: Model) -> HeadLogits:
    hidden_TH, head = model
    return HeadLogits(hidden_TH, LinearHead(head, head.forward), num_rows=head.out_features)


def _divergence(kind: str) -> Any:
    from pydantic import TypeAdapter

    config: Any = TypeAdapter(DivergenceConfig).validate_python({"type": kind})
    return build_divergence(config)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """Yields a function that tells, afterwards, the most bytes held meanwhile over those held at the start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield lambda: torch.cuda.max_memory_allocated() - before
        return
    # What earlier runs freed and the allocator kept would be held already, and not count.
    ctypes.CDLL(None).malloc_trim(0)
    before, most, done = _resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(_LOOK_EVERY_S):
            most = max(most, _resident())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: max(most, _resident()) - before
    finally:
        done.set()
        thread.join()


def _resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    typer.run(main)
