"""Multiple choice on the chain sum: which of four options a model holds to be the likeliest, token for token.

In the place of the zero-shot tasks of Jha et al. (arXiv 2305.14864): an option's score is the mean log-likelihood of
its tokens after the question. Of four options one is right, so that chance is a quarter.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gkd.seeds import generator

_BATCH = 1_000
_NEAR = 9
"""What is added or taken away at once: totals this near to the right one are wrong by one operand at most."""


@dataclass(frozen=True, slots=True)
class Question:
    """Text and what may follow."""

    context: str
    """What stands before every option."""
    options: tuple[str, ...]
    """The right one first, all different."""
    stops: bool
    """Whether the stop token belongs to every option."""


MakeQuestion = Callable[[str, list[str], np.random.Generator], Question]
"""From a prompt, its running totals, and what chance decides."""


def last_total(prompt: str, totals: list[str], random: np.random.Generator) -> Question:
    """Which total is the last, after all others."""
    before = "".join(f"{total};" for total in totals[:-1])
    return Question(prompt + before, (totals[-1], *_others(totals[-1], random)), stops=True)


def next_total(prompt: str, totals: list[str], random: np.random.Generator) -> Question:
    """Which total comes after some of them."""
    place = int(random.integers(0, len(totals) - 1))
    before = "".join(f"{total};" for total in totals[:place])
    return Question(prompt + before, (totals[place], *_others(totals[place], random)), stops=False)


def where_it_ends(prompt: str, totals: list[str], random: np.random.Generator) -> Question:
    """How many totals there are: all of them, one or two too few, or one too many. The options differ in length."""
    more = [*totals, _others(totals[-1], random)[0]]
    return Question(prompt, tuple(";".join(trace) for trace in (totals, totals[:-1], totals[:-2], more)), stops=True)


TASKS: Mapping[str, MakeQuestion] = {
    "last total": last_total,
    "next total": next_total,
    "where it ends": where_it_ends,
}
"""Name -> how a problem becomes a question."""


def _others(total: str, random: np.random.Generator) -> list[str]:
    """Three totals near one."""
    right = int(total)
    near = [n for n in range(max(0, right - _NEAR), min(99, right + _NEAR) + 1) if n != right]
    return [f"{n:02d}" for n in random.choice(near, 3, replace=False)]


def shares_right(model: Any, tokenizer: Any, problems: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Of every task, the share of questions whose right option has the highest score.

    Args:
        model: in eval mode.
        tokenizer: its.
        problems: (prompt, right completion).
    """
    shares = {}
    for name, make in TASKS.items():
        random = generator(0, f"choices: {name}")
        questions = [make(prompt, answer.split(";"), random) for prompt, answer in problems]
        scores = _scores(model, tokenizer, questions)
        shares[name] = (scores[:, 0] > scores[:, 1:].max(1).values).double().mean().item()
    return shares


@torch.no_grad()
def _scores(model: Any, tokenizer: Any, questions: Sequence[Question]) -> torch.Tensor:
    """Mean log-likelihood of each option's tokens: [questions, options]."""
    rows, starts = [], []
    for question in questions:
        context = tokenizer(question.context)["input_ids"]
        stop = [tokenizer.eos_token_id] if question.stops else []
        rows += [[*context, *tokenizer(option)["input_ids"], *stop] for option in question.options]
        starts += [len(context)] * len(question.options)
    scores = [
        _of_batch(model, rows[at : at + _BATCH], starts[at : at + _BATCH], tokenizer.eos_token_id)
        for at in range(0, len(rows), _BATCH)
    ]
    return torch.cat(scores).view(len(questions), -1)


def _of_batch(model: Any, rows: Sequence[list[int]], starts: Sequence[int], pad: int) -> torch.Tensor:
    """Padded on the right, where a causal model's earlier tokens do not see it."""
    width = max(map(len, rows))
    ids_BT = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    log_p_BT = model(ids_BT[:, :-1]).logits.log_softmax(-1).gather(-1, ids_BT[:, 1:, None]).squeeze(-1)
    place_T = torch.arange(1, width)
    ends_B1, starts_B1 = (torch.tensor(values)[:, None] for values in ([len(row) for row in rows], starts))
    counted_BT = (place_T >= starts_B1) & (place_T < ends_B1)
    return (log_p_BT * counted_BT).sum(1) / counted_BT.sum(1)
