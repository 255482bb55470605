"""The chain sum: the quickstart's task, its tokenizer and its untrained models.

Single digits are added and subtracted, and worked out as running totals, character by character:
`1+9+9-7+5+1-3-9-4+3=` -> `10;19;12;17;18;15;06;02;05`. Six to ten operands, so that lengths
differ; totals stay in 0..99.

Run as a program it writes everything that the configs in configs/quickstart/ read:

    python -m launch.chain_sum outputs/quickstart
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gkd.seeds import generator

_ALPHABET = "0123456789+-=;"
_OPERANDS = (6, 10)
_SPLITS = {"teacher": 60_000, "warmstart": 1_500, "prompts": 9_000, "test": 500}
"""Records per file; no problem is in two of them."""


def make_problem(random: np.random.Generator, operands: tuple[int, int] = _OPERANDS) -> tuple[str, str]:
    """One (prompt, completion), of so many operands. Each total stays within 0..99, so that two characters hold it."""
    total = int(random.integers(0, 10))
    prompt, totals = str(total), []
    for _ in range(int(random.integers(operands[0], operands[1] + 1)) - 1):
        digit = int(random.integers(0, 10))
        minus = bool(random.integers(0, 2)) and digit <= total
        total += -digit if minus else digit
        prompt += f"{'-' if minus else '+'}{digit}"
        totals.append(f"{total:02d}")
    return f"{prompt}=", ";".join(totals)


def write_data(folder: Path, *, seed: int) -> None:
    """Write `teacher.jsonl`, `warmstart.jsonl`, `prompts.jsonl` (no completions) and `test.jsonl`."""
    random = generator(seed, "chain-sum")
    seen: set[str] = set()
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in _SPLITS.items():
        lines: list[str] = []
        while len(lines) < count:
            prompt, completion = make_problem(random)
            if prompt in seen:
                continue
            seen.add(prompt)
            record = {"prompt": prompt} if name == "prompts" else {"prompt": prompt, "completion": completion}
            lines.append(json.dumps(record))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


SHAPES: dict[str, dict[str, int]] = {
    "teacher": {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 320},
    "student": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 192},
}


def write_models(folder: Path, shapes: Mapping[str, Mapping[str, int]] = SHAPES) -> None:
    """Write config and tokenizer of each shape, by its name, without weights: the teacher's and the student's."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<eos>": 1} | {character: i + 2 for i, character in enumerate(_ALPHABET)}
    characters = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<pad>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters, eos_token="<eos>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )
    for name, shape in shapes.items():
        config = LlamaConfig(
            vocab_size=len(vocabulary),
            num_key_value_heads=shape["num_attention_heads"],
            max_position_embeddings=64,
            # The defaults suit wide models and long contexts. At this width 0.02 leaves every layer near 0 for hundreds
            # of steps, and in a context of 64 most rotary frequencies of the default base would not turn at all.
            initializer_range=0.08,
            rope_parameters={"rope_type": "default", "rope_theta": 30.0},
            tie_word_embeddings=True,
            eos_token_id=1,
            pad_token_id=0,
            bos_token_id=None,
            architectures=["LlamaForCausalLM"],
            **shape,
        )
        config.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def prepare(folder: Path, *, seed: int = 0) -> None:
    """Everything that the quickstart's configs read."""
    write_data(folder / "data", seed=seed)
    write_models(folder / "models")


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
