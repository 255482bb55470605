"""Tiny models, tokenizers, data and configs. Every architecture here runs in transformers and in vLLM on CPUs."""

import json
from pathlib import Path
from typing import Any

import torch

ALPHABET = "abcdefghijklmnop"
VOCABULARY = len(ALPHABET) + 2  # <pad> and <eos>
EOS = 1


def make_tokenizer(*, extra: str = ""):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<eos>": EOS} | {c: i + 2 for i, c in enumerate(ALPHABET + extra)}
    characters = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<pad>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=characters, eos_token="<eos>", pad_token="<pad>")


IM_END, IM_START = 29, 30
"""Ids of the chat tokenizer's marks; <|im_end|> is its stop token."""
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_chat_tokenizer(*, template: str | None = CHAT_TEMPLATE):
    """Knows all lower-case letters, the line break and ChatML's marks: 31 tokens."""
    tokenizer = make_tokenizer(extra="qrstuvwxyz\n")
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = template
    return tokenizer


def make_config(architecture: str, *, rows: int = VOCABULARY, tied: bool | None = None, context: int = 96):
    """A config of two layers, width 64, heads of width 32; `tied` None is the architecture's own habit."""
    from transformers import (
        Gemma2Config,
        GPT2Config,
        LlamaConfig,
        OPTConfig,
        PhiConfig,
        Qwen2Config,
    )

    common = {"vocab_size": rows, "eos_token_id": EOS, "pad_token_id": 0, "bos_token_id": None}
    if tied is not None:
        common["tie_word_embeddings"] = tied
    modern = common | {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 96,
        "max_position_embeddings": context,
        "initializer_range": 0.2,
    }
    match architecture:
        case "qwen2":
            return Qwen2Config(**modern, num_key_value_heads=1)
        case "llama":
            return LlamaConfig(**modern, num_key_value_heads=2)
        case "phi":
            return PhiConfig(**modern, resid_pdrop=0.1, embd_pdrop=0.1)
        case "gemma2":
            return Gemma2Config(
                **modern, num_key_value_heads=1, head_dim=32, query_pre_attn_scalar=32, final_logit_softcapping=5.0
            )
        case "gpt2":
            return GPT2Config(**common, n_embd=64, n_layer=2, n_head=2, n_positions=context, initializer_range=0.2)
        case "opt":
            return OPTConfig(
                **common,
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                ffn_dim=96,
                max_position_embeddings=context,
                word_embed_proj_dim=64,
                init_std=0.2,
                dropout=0.1,
            )
    raise ValueError(architecture)


def make_model(architecture: str, *, seed: int = 0, **options: Any):
    """A random model in eval mode. Norms and biases are random too: at their initial 0 and 1 they hide mistakes."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(architecture, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def save_model(folder: Path, architecture: str, *, seed: int = 0, extra: str = "", **options: Any) -> str:
    """Write a random model with its tokenizer; returns the folder as a string."""
    make_model(architecture, seed=seed, **options).save_pretrained(folder)
    make_tokenizer(extra=extra).save_pretrained(folder)
    return str(folder)


def write_records(path: Path, count: int, *, completions: bool = True, seed: int = 0) -> str:
    """Records with prompts of 1 to 12 characters and completions of 1 to 9; returns the path as a string."""
    random = torch.Generator().manual_seed(seed)

    def text(longest: int) -> str:
        length = int(torch.randint(1, longest + 1, (), generator=random))
        return "".join(ALPHABET[i] for i in torch.randint(0, len(ALPHABET), (length,), generator=random).tolist())

    lines = []
    for _ in range(count):
        record = {"prompt": text(12)}
        if completions:
            record["completion"] = text(9)
        lines.append(json.dumps(record))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def config_tree(folder: Path, student: str, teacher: str, train: str) -> dict[str, Any]:
    """A small complete config as nested dictionaries."""
    return {
        "run": {"name": "tiny", "seed": 3, "output_dir": str(folder), "resume": "never"},
        "student": {"model": student},
        "teacher": {"model": teacher, "sequences_per_batch": 4},
        "data": {"train": {"path": train}, "on_policy_fraction": 1.0},
        "rollout": {"temperature": 1.0, "max_new_tokens": 16, "kv_cache_gib": 0.1, "timeout_s": 120},
        "objective": {"type": "distill", "divergence": {"type": "generalized_jsd", "beta": 0.5}},
        "trainer": {
            "num_ranks": 1,
            "zero_stage": 2,
            "max_steps": 3,
            "batch_size": 8,
            "learning_rate": 0.01,
            "checkpoint_every": 2,
        },
    }


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A JSONL file's objects."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
