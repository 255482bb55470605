"""Whether a LoRA adapter fits its model: that every target is there, and that the rollout engine takes it."""

from collections.abc import Iterable

from gkd.config.models import LoraConfig
from gkd.errors import UserError
from launch.architecture import Architecture

_WITHOUT_ADAPTERS = frozenset(
    {
        "BloomForCausalLM",
        "DbrxForCausalLM",
        "FalconForCausalLM",
        "GPT2LMHeadModel",
        "GPTJForCausalLM",
        "Gemma3nForCausalLM",
        "Mamba2ForCausalLM",
        "MambaForCausalLM",
        "StableLmForCausalLM",
        "Zamba2ForCausalLM",
    }
)
"""Architectures that vLLM 0.32 serves without LoRA."""


def check_lora(lora: LoraConfig, student: Architecture, *, needs_engine: bool) -> int:
    """Refuse an adapter of which a part would be left out, or that could not be served.

    peft itself only refuses an adapter of which no target matches at all: one misspelt name among several would be
    left out in silence.

    Args:
        lora: the adapter.
        student: its model.
        needs_engine: whether a rollout engine serves it.

    Returns:
        The adapter's number of parameters: r (inputs + outputs) of each layer that gets one.

    Raises:
        UserError: naming the target.
    """
    if needs_engine and student.name in _WITHOUT_ADAPTERS:
        raise UserError(
            "student.lora",
            student.name,
            "is an architecture that vLLM serves without adapters.",
            "Train all weights (remove student.lora), or use another model.",
        )
    layers = _targeted(lora, student)
    return sum(lora.r * sum(student.linear[name]) for name in layers)


def _targeted(lora: LoraConfig, student: Architecture) -> set[str]:
    if lora.targets == "all-linear":
        layers = set(student.linear)
    else:
        layers = {name for target in lora.targets for name in _match(target, student)}
    if not layers:
        raise UserError("student.lora.targets", lora.targets, "match no layer.", _cure(student))
    return layers


def _match(target: str, student: Architecture) -> list[str]:
    """The layers that a target names: by their whole dotted name or by its end, as in peft."""
    found = [name for name in student.modules if name == target or name.endswith(f".{target}")]
    if not found:
        raise UserError("student.lora.targets", target, f"matches no module of {student.name}.", _cure(student))
    if any(name not in student.linear for name in found):
        raise UserError(
            "student.lora.targets", target, "is no linear layer below the head of the model.", _cure(student)
        )
    return found


def _cure(student: Architecture) -> str:
    names = _last_parts(student.linear)
    return f"Use some of: {', '.join(names)}." if names else "Train all weights: remove student.lora."


def _last_parts(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})
