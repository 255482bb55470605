"""In which form the teacher's judgement travels: what the objective requires, the teacher provides, and is smallest."""

from gkd.config import Config
from gkd.config.models import TeacherConfig
from gkd.config.objective import Reserved
from gkd.errors import UserError
from gkd.objectives import build_objective
from gkd.signals import WHOLE_DISTRIBUTION, SignalKind
from launch.architecture import Architecture

PROVIDES: dict[str, frozenset[SignalKind]] = {
    "hf": WHOLE_DISTRIBUTION | {SignalKind.TOP_K, SignalKind.SAMPLED_LOGPROBS},
    "vllm": frozenset({SignalKind.TOP_K, SignalKind.SAMPLED_LOGPROBS}),
    "student_base": WHOLE_DISTRIBUTION,
}
"""What each `teacher.backend` can send."""


def check_signal(config: Config) -> frozenset[SignalKind]:
    """The kinds that would do, of which `teacher.signal: auto` may choose; empty if no teacher is needed.

    Raises:
        UserError: if the teacher cannot give what the objective requires, or the config names another kind.
    """
    assert not isinstance(config.objective, Reserved), "refused when the config was loaded"
    required = build_objective(config.objective).requires
    if not required or config.teacher is None:
        return frozenset()
    backend, asked = config.teacher.backend, config.teacher.signal
    possible = required & PROVIDES[backend]
    if not possible:
        raise UserError(
            "teacher.backend",
            backend,
            f"provides {_listed(PROVIDES[backend])}, and the {config.objective.type} objective requires "
            f"{_listed(required)}.",
            "Use the backend hf, or another objective.",
        )
    if asked == "auto":
        return possible
    if asked not in required:
        raise UserError(
            "teacher.signal",
            asked,
            f"is not what the {config.objective.type} objective requires.",
            f"Use {_listed(possible)}.",
        )
    if asked not in possible:
        raise UserError(
            "teacher.signal", asked, f"is not what a teacher on {backend} provides.", f"Use {_listed(possible)}."
        )
    return frozenset({SignalKind(asked)})


def choose_signal(config: Config, teacher: Architecture | None, *, rows: int) -> SignalKind | None:
    """What the teacher workers send: the smallest of the kinds that would do. None where there are none.

    Args:
        config: the run's.
        teacher: the architecture of the teacher; None where it has no workers of its own.
        rows: V.

    Raises:
        UserError: as `check_signal`.
    """
    possible = check_signal(config)
    if teacher is None or not possible:
        return None
    if SignalKind.SAMPLED_LOGPROBS in possible:
        return SignalKind.SAMPLED_LOGPROBS  # who can do with the sampled token compares nothing else
    whole = possible & WHOLE_DISTRIBUTION
    if len(whole) == 2:
        return SignalKind.HIDDEN_STATES if teacher.hidden_size < rows else SignalKind.FULL_LOGITS
    return min(whole or possible)


def signal_bytes(kind: SignalKind, teacher: TeacherConfig, *, rows: int, hidden_size: int) -> int:
    """Bytes of one token's signal."""
    width = 2 if teacher.dtype == "bfloat16" else 4
    match kind:
        case SignalKind.FULL_LOGITS:
            return rows * width
        case SignalKind.HIDDEN_STATES:
            return hidden_size * width
        case SignalKind.TOP_K:
            return 8 * (min(teacher.top_k, rows) + teacher.student_top_k + 1) + 8
        case _:
            return 4


def _listed(kinds: frozenset[SignalKind]) -> str:
    return " or ".join(sorted(kinds))
