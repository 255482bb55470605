"""What is measured: model pairs, batches and lengths, and the files that all systems read.

All systems take the same prompts in the same order, which is gkd's: a run shuffles its data. Every batch has the same
lengths, of prompts and of completions, so that all steps cost the same, whichever are counted.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gkd.config.schema import RunConfig
from rollout.prompts import PromptStream
from rollout.tokenized import TokenizedRecord

FOLDER = Path("outputs/bench")
READY = "ready"
"""What each system prints once everything is loaded."""
_MLP = 3
"""Width of the hidden layer, over the model's."""
_CASE = "case.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Of a Llama with a tied head."""

    width: int
    layers: int
    heads: int
    key_value_heads: int

    def parameters(self, vocabulary: int) -> int:
        """How many it has, with so many rows in its head."""
        key_value_width = self.width // self.heads * self.key_value_heads
        attention = 2 * self.width * (self.width + key_value_width)
        layer = attention + 3 * self.width * _MLP * self.width + 2 * self.width
        return vocabulary * self.width + self.layers * layer + self.width


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A student and its teacher, with random weights: what they say does not change what a step costs."""

    name: str
    vocabulary: int
    student: Shape
    teacher: Shape


LARGE = Pair(
    name="32k",
    vocabulary=32_000,
    student=Shape(width=256, layers=4, heads=4, key_value_heads=2),
    teacher=Shape(width=512, layers=12, heads=8, key_value_heads=4),
)
"""11.3 M and 54 M parameters."""
SMALL = Pair(
    name="2k",
    vocabulary=2_048,
    student=Shape(width=128, layers=2, heads=4, key_value_heads=2),
    teacher=Shape(width=256, layers=6, heads=8, key_value_heads=2),
)
"""0.66 M and 5.0 M."""
TINY = Pair(
    name="tiny",
    vocabulary=17,
    student=Shape(width=64, layers=2, heads=2, key_value_heads=2),
    teacher=Shape(width=128, layers=6, heads=4, key_value_heads=4),
)
"""The quickstart's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One on-policy step, many times."""

    name: str
    pair: Pair
    batch: int
    """Sequences of a step."""
    prompt_tokens: tuple[int, int]
    """Shortest and longest."""
    new_tokens: tuple[int, int]
    """Shortest and longest; each sequence's is settled beforehand, so that all systems make the same tokens."""
    warm_up: int = 1
    """Steps that are not counted."""
    steps: int = 3
    """Steps that are."""
    peer_warm_up: int | None = None
    """Steps of TRL's that are not counted; None: as many. At V = 32,000 its first takes as long as the others."""
    peer_micro_batches: int = 1
    """Into how many TRL's batch is divided, where it does not fit into memory whole."""
    streams: bool = True
    """Whether a run at staleness 1 is measured beside the strictly on-policy one."""
    rollout_actors: int = 1
    """Engines of a gkd run; what it is compared with has one."""
    teacher_actors: int = 1
    """Likewise its teachers."""
    ranks: int = 1
    """Likewise its training ranks."""

    @property
    def folder(self) -> Path:
        """Of the pair and the prompts."""
        return FOLDER / self.name

    @property
    def run_steps(self) -> int:
        """Steps of a gkd run: one more than elsewhere, because a step's seconds end with the next one's batch."""
        return self.warm_up + self.steps + 1

    @property
    def is_fixed(self) -> bool:
        """Whether all sequences are equally long."""
        return self.new_tokens[0] == self.new_tokens[1]


_FIXED: dict[str, Any] = {"prompt_tokens": (12, 12), "new_tokens": (128, 128)}
CASES = {
    case.name: case
    for case in (
        Case(name="fixed_32k_b16", pair=LARGE, batch=16, streams=False, peer_warm_up=0, **_FIXED),
        Case(name="fixed_32k_b32", pair=LARGE, batch=32, peer_warm_up=0, **_FIXED),
        Case(
            name="natural_32k_b32",
            pair=LARGE,
            batch=32,
            prompt_tokens=(16, 128),
            new_tokens=(16, 256),
            steps=2,  # TRL's take a minute and more
            peer_warm_up=0,
            peer_micro_batches=2,  # whole it takes more than 22 GB
        ),
        Case(name="fixed_2k_b16", pair=SMALL, batch=16, streams=False, warm_up=3, steps=6, **_FIXED),
        Case(name="fixed_2k_b64", pair=SMALL, batch=64, warm_up=2, steps=5, **_FIXED),
        Case(name="quickstart", pair=TINY, batch=32, prompt_tokens=(12, 20), new_tokens=(15, 27), warm_up=5, steps=15),
    )
}


def write_inputs(case: Case) -> None:
    """The case, models, tokenizer and prompts. Token 0 pads and token 1 stops; prompts have neither."""
    case.folder.mkdir(parents=True, exist_ok=True)
    (case.folder / _CASE).write_text(json.dumps(asdict(case)), encoding="utf-8")
    pair = case.pair
    write_model(case.folder / "student", pair.student, pair.vocabulary)
    write_model(case.folder / "teacher", pair.teacher, pair.vocabulary)
    random = np.random.default_rng(0)
    of_prompts, of_completions = (
        random.integers(shortest, longest + 1, case.batch).tolist()
        for shortest, longest in (case.prompt_tokens, case.new_tokens)
    )
    lines = [""] * (case.batch * case.run_steps)
    for number, place in enumerate(_order(len(lines))):
        ids = random.integers(2, pair.vocabulary, of_prompts[number % case.batch])
        record = {"prompt": " ".join(f"w{i}" for i in ids), "new_tokens": of_completions[number % case.batch]}
        lines[place] = json.dumps(record) + "\n"
    (case.folder / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")


def _order(num_prompts: int) -> list[int]:
    """Places in a file of so many prompts, in the order in which a gkd run takes them."""
    records = [TokenizedRecord(index=place, prompt_ids=(), completion=None) for place in range(num_prompts)]
    stream = PromptStream(records, seed=RunConfig.model_fields["seed"].default, samples_per_prompt=1)
    return [stream.sample(number).id.prompt_index for number in range(num_prompts)]


def write_model(folder: Path, shape: Shape, vocabulary: int) -> None:
    """A model with random weights and its tokenizer, whose tokens are words of their own."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(vocab=words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(shape.layers)
    AutoModelForCausalLM.from_config(model_config(shape, vocabulary)).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)


def model_config(shape: Shape, vocabulary: int, *, positions: int = 512) -> Any:
    """Of a model in transformers."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        intermediate_size=_MLP * shape.width,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )


def read_case(folder: Path) -> Case:
    """The case whose inputs were written there."""
    tree = json.loads((folder / _CASE).read_text(encoding="utf-8"))
    shapes = {name: Shape(**tree["pair"][name]) for name in ("student", "teacher")}
    spans = {name: tuple(tree[name]) for name in ("prompt_tokens", "new_tokens")}
    return Case(**tree | spans | {"pair": Pair(**tree["pair"] | shapes)})


def read_prompts(case: Case) -> list[tuple[tuple[int, ...], int]]:
    """(token ids, length of the completion) of every prompt, in the order in which they are taken."""
    lines = (case.folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(lines[place]) for place in _order(len(lines))]
    return [(tuple(int(word[1:]) for word in r["prompt"].split()), r["new_tokens"]) for r in records]


def lengths_by_prompt(case: Case) -> Mapping[tuple[int, ...], int]:
    """Token ids of a prompt -> how long its completion is."""
    return dict(read_prompts(case))


def batches(case: Case) -> list[Sequence[tuple[tuple[int, ...], int]]]:
    """The prompts of each step that is measured, warm-up included."""
    prompts = read_prompts(case)
    return [prompts[step * case.batch :][: case.batch] for step in range(case.warm_up + case.steps)]


def new_tokens_per_step(case: Case) -> int:
    """How many tokens each batch is to have generated."""
    return sum(length for _, length in batches(case)[0])
