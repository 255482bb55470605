"""What a top-k signal loses of a divergence and of its gradient, on distributions as peaked as a language model's.

    python -m benchmarks.top_k

The teacher's logit of the token of rank r is -s log r (Zipf's law with exponent s), ranks in a random order, s drawn
for each position between 1 and 3: from positions where much is possible to positions where one token has most of the
mass. The student's logits are the teacher's plus normal noise. The sampled token is drawn from the student, as
on-policy. The table of docs/OBJECTIVES.md is what this prints.
"""

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import typer

from gkd import divergences
from gkd.divergences import Divergence
from gkd.logits import WholeLogits
from gkd.sparse import top_k_signal
from gkd.teacher_view import TeacherView, TopKView, WholeView

DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": divergences.forward_kl,
    "reverse_kl": divergences.reverse_kl,
    "generalized_jsd": lambda student, teacher: divergences.generalized_jsd(student, teacher, beta=0.5),
    "adaptive_kl": lambda student, teacher: divergences.adaptive_kl(student, teacher, head_mass=0.5),
}
_CPU = torch.device("cpu")


def main(
    vocab: Annotated[int, typer.Option(help="Rows of both heads.")] = 32_000,
    tokens: Annotated[int, typer.Option(help="Positions.")] = 256,
    noise: Annotated[float, typer.Option(help="Standard deviation of student minus teacher logits.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
) -> None:
    """Measure top-k signals of several sizes, with and without the student's favourites."""
    torch.manual_seed(seed)
    teacher_TV = zipf_logits(tokens, vocab)
    student_TV = (teacher_TV + noise * torch.randn(tokens, vocab)).requires_grad_()
    sampled_T = torch.multinomial(student_TV.detach().softmax(-1), 1).squeeze(-1)
    top_mass = teacher_TV.softmax(-1).topk(64, dim=-1).values
    for k in (1, 4, 16, 64):
        print(f"teacher's {k} most probable tokens: {top_mass[:, :k].sum(-1).mean().item():.3f} of its mass")
    for name, divergence in DIVERGENCES.items():
        exact_T, exact_TV = measured(divergence, student_TV, WholeView(WholeLogits(teacher_TV)))
        print(f"{name}: exact {exact_T.mean().item():.4f} nats per token")
        for favourites in (16, 0):
            ids_TM = student_TV.detach().topk(favourites, dim=-1).indices if favourites else None
            for k in (4, 16, 64):
                signal = top_k_signal(WholeLogits(teacher_TV), sampled_T, k=k, temperature=1.0, student_ids_TM=ids_TM)
                value_T, gradient_TV = measured(divergence, student_TV, TopKView([signal], _CPU))
                lost = 1 - (value_T.sum() / exact_T.sum()).item()
                error = ((gradient_TV - exact_TV).norm() / exact_TV.norm()).item()
                print(f"  top_k {k:2}, student_top_k {favourites:2}: value {-lost:+.2%}, gradient off by {error:.2%}")


def zipf_logits(tokens: int, vocab: int) -> torch.Tensor:
    """[T, V] logits of distributions that fall with a power of the rank, every position's ranks in an order of its
    own."""
    exponents_T1 = torch.empty(tokens, 1).uniform_(1, 3)
    sorted_TV = -exponents_T1 * torch.arange(1, vocab + 1).log()
    order_TV = torch.rand(tokens, vocab).argsort(-1)
    return torch.empty_like(sorted_TV).scatter_(-1, order_TV, sorted_TV)


def measured(
    divergence: Divergence, student_TV: torch.Tensor, teacher: TeacherView
) -> tuple[torch.Tensor, torch.Tensor]:
    """[T] values, and [T, V] their gradient with respect to the student's logits."""
    loss_T = divergence(*teacher.pair(student_TV, slice(0, len(student_TV)), temperature=1.0))
    (gradient_TV,) = torch.autograd.grad(loss_T.sum(), student_TV)
    return loss_T.detach(), gradient_TV


if __name__ == "__main__":
    typer.run(main)
