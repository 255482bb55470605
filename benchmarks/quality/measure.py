"""What a student has learnt: measured by `transformers`, without the code that trained it but for the critics.

Legend: B sequences, T response tokens of a sequence, V vocabulary.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.quality.moments import distances
from benchmarks.quality.task import Task

_BATCH = 500
_PROBES = 1_000
"""Prompts whose sampled answers are compared with the teacher."""
_MOMENTS = 200
"""Prompts at which critics learn."""


def load(folder: Path) -> Any:
    """A model in eval mode."""
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def measure(folder: Path, teacher: Any, task: Task, problems: list[tuple[str, str]], *, seed: int) -> dict[str, Any]:
    """Everything that the tables and plots show of one student.

    Args:
        folder: the exported student.
        teacher: the loaded model that it learnt from.
        task: what counts as the answer, and how long it gets.
        problems: (prompt, right completion), none of which it has seen; all prompts are of one length.
        seed: of the sampled answers.

    Returns:
        Of greedy completions `exact_match` (the answer is right), `whole_match` (and all that leads to it) and
        `recovered` (share of right answers among completions that are not right as a whole), and as `sampled_...`
        of sampled ones; in nats per token `forward_kl`,
        `reverse_kl`, `total_variation` and `entropy` on its own sampled answers, and `dataset_...` on the right
        completions; `reverse_kl_by_position`; and what
        `benchmarks.quality.moments.distances` finds.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    student = load(folder)
    stop = tokenizer.eos_token_id
    probes = problems[:_PROBES]
    prompts_BT, given_BT = _tokens(tokenizer, probes)
    greedy_BT = _complete(student, _tokens(tokenizer, problems)[0], stop, task.new_tokens, sample=False)
    torch.manual_seed(seed)
    sampled_BT = _complete(student, prompts_BT, stop, task.new_tokens, sample=True)
    own = _compared(student, teacher, prompts_BT, sampled_BT, stop)
    dataset = _compared(student, teacher, prompts_BT, given_BT, stop)
    padded_BT = torch.nn.functional.pad(given_BT, (0, sampled_BT.shape[1] - given_BT.shape[1]), value=stop)
    both_BT = torch.cat([sampled_BT[:_MOMENTS], padded_BT[:_MOMENTS]])
    moments = distances(
        student,
        teacher,
        torch.cat([prompts_BT[:_MOMENTS].repeat(2, 1), both_BT], 1),
        torch.nn.functional.pad(_counted(both_BT, stop), (prompts_BT.shape[1], 0)),
        torch.tensor([True, False]).repeat_interleave(_MOMENTS),
    )
    return {
        **_shares_right(tokenizer, greedy_BT, problems, task),
        **{f"sampled_{name}": share for name, share in _shares_right(tokenizer, sampled_BT, probes, task).items()},
        **{name: value for name, value in own.items() if name != "by_position"},
        **{f"dataset_{name}": value for name, value in dataset.items() if name != "by_position"},
        **moments,
        "reverse_kl_by_position": own["by_position"],
    }


def exact_match(student: Any, tokenizer: Any, task: Task, problems: list[tuple[str, str]]) -> float:
    """Share of greedy answers that are right; all prompts are of one length."""
    prompts_BT, _ = _tokens(tokenizer, problems)
    greedy_BT = _complete(student, prompts_BT, tokenizer.eos_token_id, task.new_tokens, sample=False)
    return _shares_right(tokenizer, greedy_BT, problems, task)["exact_match"]


@torch.no_grad()
def cross_entropy(student: Any, tokenizer: Any, problems: list[tuple[str, str]]) -> float:
    """Mean negative log-likelihood of the right answers, stop token included, in nats per token."""
    prompts_BT, given_BT = _tokens(tokenizer, problems)
    total = 0.0
    for prompt, given in zip(prompts_BT.split(_BATCH), given_BT.split(_BATCH), strict=True):
        labels = torch.cat([torch.full_like(prompt, -100), given], 1)
        total += student(torch.cat([prompt, given], 1), labels=labels).loss.item() * len(given)
    return total / len(problems)


def _tokens(tokenizer: Any, problems: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts, and right answers with the stop token: all of one length each."""
    prompts = [tokenizer(prompt)["input_ids"] for prompt, _ in problems]
    answers = [[*tokenizer(answer)["input_ids"], tokenizer.eos_token_id] for _, answer in problems]
    return torch.tensor(prompts), torch.tensor(answers)


def _shares_right(
    tokenizer: Any, completions_BT: torch.Tensor, problems: list[tuple[str, str]], task: Task
) -> dict[str, float]:
    """`exact_match`, of answers; `whole_match`, of all that leads to them; `recovered`, of answers after a mistake."""
    stop = tokenizer.eos_token_id
    texts = tokenizer.batch_decode([_until(row.tolist(), stop) for row in completions_BT])
    pairs = [(text, right) for text, (_, right) in zip(texts, problems, strict=True)]
    whole = sum(text == right for text, right in pairs)
    answered = sum(task.answer(text) == task.answer(right) for text, right in pairs)
    return {
        "exact_match": answered / len(pairs),
        "whole_match": whole / len(pairs),
        "recovered": (answered - whole) / max(1, len(pairs) - whole),
    }


def _complete(model: Any, prompts_BT: torch.Tensor, stop: int, new_tokens: int, *, sample: bool) -> torch.Tensor:
    """Responses [B, new_tokens], in batches; after the stop token comes more of it."""
    return torch.cat([_generated(model, part, stop, new_tokens, sample=sample) for part in prompts_BT.split(_BATCH)])


@torch.no_grad()
def _generated(model: Any, prompts_BT: torch.Tensor, stop: int, new_tokens: int, *, sample: bool) -> torch.Tensor:
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
    found = model.generate(
        prompts_BT,
        attention_mask=torch.ones_like(prompts_BT),
        max_new_tokens=new_tokens,
        eos_token_id=stop,
        pad_token_id=stop,
        **options,
    )[:, prompts_BT.shape[1] :]
    return torch.nn.functional.pad(found, (0, new_tokens - found.shape[1]), value=stop)


def _until(ids: list[int], stop: int) -> list[int]:
    return ids[: ids.index(stop)] if stop in ids else ids


def _counted(responses_BT: torch.Tensor, stop: int) -> torch.Tensor:
    """[B, T] bool: up to the first stop token, and with it."""
    return (responses_BT == stop).cumsum(1) - (responses_BT == stop).long() == 0


@torch.no_grad()
def _compared(
    student: Any, teacher: Any, prompts_BT: torch.Tensor, responses_BT: torch.Tensor, stop: int
) -> dict[str, Any]:
    """Means over the response tokens up to the first stop token; `by_position` the reverse KL of each position."""
    mask_BT = _counted(responses_BT, stop)
    sums: dict[str, torch.Tensor] = {}
    for prompt, response, mask in zip(
        prompts_BT.split(_BATCH), responses_BT.split(_BATCH), mask_BT.split(_BATCH), strict=True
    ):
        for name, value in _per_token(student, teacher, prompt, response).items():
            sums[name] = sums.get(name, 0) + (value.double() * mask).sum(0)
    counts_T = mask_BT.sum(0).clamp(min=1)
    means: dict[str, Any] = {name: (value.sum() / mask_BT.sum()).item() for name, value in sums.items()}
    return means | {"by_position": (sums["reverse_kl"] / counts_T).tolist()[: int(mask_BT.any(0).sum())]}


def _per_token(
    student: Any, teacher: Any, prompts_BT: torch.Tensor, responses_BT: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Each [B, T]."""
    ids = torch.cat([prompts_BT, responses_BT], 1)
    before = slice(prompts_BT.shape[1] - 1, ids.shape[1] - 1)
    log_s = student(ids).logits[:, before].log_softmax(-1)
    log_t = teacher(ids).logits[:, before].log_softmax(-1)
    s, t = log_s.exp(), log_t.exp()
    return {
        "forward_kl": (t * (log_t - log_s)).sum(-1),
        "reverse_kl": (s * (log_s - log_t)).sum(-1),
        "total_variation": (t - s).abs().sum(-1) / 2,
        "entropy": -(s * log_s).sum(-1),
    }
