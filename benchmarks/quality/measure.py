"""What a student has learnt, measured by transformers alone: nothing here shares code with what trained it.

Legend: B sequences, T response tokens of a sequence, V vocabulary.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

_BATCH = 500
_NEW_TOKENS = 32
_PROBES = 1_000
"""Prompts whose sampled answers are compared with the teacher."""


def load(folder: Path) -> Any:
    """A model in eval mode."""
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def measure(folder: Path, teacher: Any, problems: list[tuple[str, str]], *, seed: int) -> dict[str, Any]:
    """Everything that the tables and plots show of one student.

    Args:
        folder: the exported student.
        teacher: the loaded model that it learnt from.
        problems: (prompt, right completion), none of which it has seen; all prompts are of one length.
        seed: of the sampled answers.

    Returns:
        `exact_match` of greedy answers; in nats per token `forward_kl`, `reverse_kl`, `total_variation` and `entropy`
        on its own sampled answers, and `dataset_...` on the right completions; `reverse_kl_by_position`.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    student = load(folder)
    stop = tokenizer.eos_token_id
    prompts_BT = torch.tensor([tokenizer(prompt)["input_ids"] for prompt, _ in problems])
    torch.manual_seed(seed)
    probes_BT = prompts_BT[:_PROBES]
    sampled_BT = torch.cat([_answer(student, part, stop, sample=True) for part in probes_BT.split(_BATCH)])
    given_BT = torch.tensor([[*tokenizer(answer)["input_ids"], stop] for _, answer in problems[:_PROBES]])
    own = _compared(student, teacher, probes_BT, sampled_BT, stop)
    dataset = _compared(student, teacher, probes_BT, given_BT, stop)
    return {
        "exact_match": greedy_exact_match(student, tokenizer, problems),
        **{name: value for name, value in own.items() if name != "by_position"},
        **{f"dataset_{name}": value for name, value in dataset.items() if name != "by_position"},
        "reverse_kl_by_position": own["by_position"],
    }


@torch.no_grad()
def greedy_exact_match(student: Any, tokenizer: Any, problems: list[tuple[str, str]]) -> float:
    """Share of greedy answers that are right; all prompts are of one length."""
    stop = tokenizer.eos_token_id
    prompts_BT = torch.tensor([tokenizer(prompt)["input_ids"] for prompt, _ in problems])
    greedy = torch.cat([_answer(student, part, stop, sample=False) for part in prompts_BT.split(_BATCH)])
    texts = tokenizer.batch_decode([_until(row.tolist(), stop) for row in greedy])
    right = [text == answer for text, (_, answer) in zip(texts, problems, strict=True)]
    return sum(right) / len(right)


@torch.no_grad()
def cross_entropy(student: Any, tokenizer: Any, problems: list[tuple[str, str]]) -> float:
    """Mean negative log-likelihood of the right answers, stop token included, in nats per token."""
    rows = [tokenizer(prompt + answer)["input_ids"] + [tokenizer.eos_token_id] for prompt, answer in problems]
    prompt_tokens = len(tokenizer(problems[0][0])["input_ids"])
    losses = []
    for ids_BT in torch.tensor(rows).split(_BATCH):
        labels_BT = ids_BT.clone()
        labels_BT[:, :prompt_tokens] = -100
        losses.append(student(ids_BT, labels=labels_BT).loss * len(ids_BT))
    return (torch.stack(losses).sum() / len(rows)).item()


def _answer(model: Any, prompts_BT: torch.Tensor, stop: int, *, sample: bool) -> torch.Tensor:
    """Responses [B, 32]; after the stop token comes more of it."""
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
    found = model.generate(
        prompts_BT,
        attention_mask=torch.ones_like(prompts_BT),
        max_new_tokens=_NEW_TOKENS,
        eos_token_id=stop,
        pad_token_id=stop,
        **options,
    )[:, prompts_BT.shape[1] :]
    return torch.nn.functional.pad(found, (0, _NEW_TOKENS - found.shape[1]), value=stop)


def _until(ids: list[int], stop: int) -> list[int]:
    return ids[: ids.index(stop)] if stop in ids else ids


def _compared(
    student: Any, teacher: Any, prompts_BT: torch.Tensor, responses_BT: torch.Tensor, stop: int
) -> dict[str, Any]:
    """Means over the response tokens up to the first stop token; `by_position` the reverse KL of each position."""
    ended_BT = (responses_BT == stop).cumsum(1)
    mask_BT = ended_BT - (responses_BT == stop).long() == 0
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
