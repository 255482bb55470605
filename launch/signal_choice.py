"""In which form the teacher's judgement travels: what the objective requires, the teacher provides, and is smallest."""

from collections.abc import Sequence

from gkd.config import Config
from gkd.config.models import TeacherConfig
from gkd.errors import UserError
from gkd.objectives import build_objective
from gkd.signals import ANY_DISTRIBUTION, WHOLE_DISTRIBUTION, SignalKind
from launch.architecture import Architecture
from launch.stages import in_each_stage

PROVIDES: dict[str, frozenset[SignalKind]] = {
    "hf": WHOLE_DISTRIBUTION | {SignalKind.TOP_K, SignalKind.SAMPLED_LOGPROBS},
    "vllm": frozenset({SignalKind.TOP_K, SignalKind.SAMPLED_LOGPROBS}),
    "student_base": WHOLE_DISTRIBUTION,
    "student_ema": WHOLE_DISTRIBUTION,
}
"""What each `teacher.backend` can send."""

_VIEWS: tuple[frozenset[SignalKind], ...] = (
    # Who can do with the sampled token compares nothing else.
    frozenset({SignalKind.SAMPLED_LOGPROBS}),
    WHOLE_DISTRIBUTION,
    frozenset({SignalKind.TOP_K}),
    frozenset({SignalKind.ATTENTION_RELATIONS}),
)
"""Kinds that may mix in one batch, the first choice first."""


def check_signal(config: Config) -> tuple[frozenset[SignalKind], ...]:
    """For each teacher the kinds that would do, of which its `signal: auto` may choose; empty if none is needed.

    The teachers' signals meet in one batch, so they are of one view. They are the same in all stages.

    Raises:
        UserError: if a teacher cannot give what the objectives require, or the config names another kind.
    """
    required, who = _required(config)
    if not required or not config.all_teachers:
        return ()
    # The teacher's signal is the same for what is trained on and what is evaluated.
    if config.eval.every_steps > 0 and "divergence" in config.measured:
        required &= ANY_DISTRIBUTION
        if not required or any(teacher.signal == SignalKind.SAMPLED_LOGPROBS for teacher in config.all_teachers):
            raise UserError(
                "eval.metrics",
                config.eval.metrics,
                "include divergence, and the teacher says nothing but the log-probabilities of the sampled tokens.",
                "Leave it out, or set teacher.signal to auto.",
            )
    if config.mixture is not None:
        required, who = _of_a_mixture(config, required, who), "a mixture of teachers"
    pairs = zip(config.teacher_fields, config.all_teachers, strict=True)
    possible = [_possible(field, teacher, required, who) for field, teacher in pairs]
    for view in _VIEWS:
        if all(kinds & view for kinds in possible):
            return tuple(kinds & view for kinds in possible)
    signals = ", ".join(f"{teacher.name}: {teacher.signal} on {teacher.backend}" for teacher in config.all_teachers)
    raise UserError(
        "teachers", signals, "cannot be compared as one.", "Give all teachers one `signal`, or leave all at auto."
    )


def _required(config: Config) -> tuple[frozenset[SignalKind], str]:
    """The kinds that serve every stage with a teacher, and whose objectives require them."""
    needed = in_each_stage(config, _required_in_stage)
    asking = [(part, kinds) for part, kinds in zip(config.parts, needed, strict=True) if kinds]
    if not asking:
        return frozenset(), ""
    common = frozenset.intersection(*(kinds for _, kinds in asking))
    types = list(dict.fromkeys(part.objective.type for part, _ in asking))
    who = f"the {types[0]} objective" if len(types) == 1 else f"each of the objectives {' and '.join(types)}"
    temperatures = sorted({loss_temperature(part) for part, _ in asking})
    if len(temperatures) > 1:
        common &= WHOLE_DISTRIBUTION
        who += f", at the temperatures {' and '.join(f'{t:g}' for t in temperatures)},"
    if not common:
        raise UserError(
            "stages",
            "; ".join(f"{part.objective.type}: {_listed(kinds)}" for part, kinds in asking),
            f"is what the stages require of one teacher: nothing serves {who.rstrip(',')}.",
            "Give them one temperature and objectives that require the same, or run one config after the other.",
        )
    return common, who


def _required_in_stage(config: Config) -> frozenset[SignalKind]:
    return build_objective(config.objective).requires


def loss_temperature(config: Config) -> float:
    """Of a stage."""
    return config.objective.temperature


def _of_a_mixture(config: Config, required: frozenset[SignalKind], who: str) -> frozenset[SignalKind]:
    """Of the required kinds, those that can be mixed."""
    if SignalKind.FULL_LOGITS in required:
        return required & WHOLE_DISTRIBUTION
    raise UserError(
        "teachers",
        ", ".join(teacher.name for teacher in config.all_teachers),
        f"are a mixture, which has no {_listed(required)}, and {who} requires that.",
        "Remove the weights, so that each record has one teacher, or name one teacher.",
    )


def _possible(field: str, teacher: TeacherConfig, required: frozenset[SignalKind], who: str) -> frozenset[SignalKind]:
    """The kinds that one teacher may send."""
    backend, asked = teacher.backend, teacher.signal
    possible = required & PROVIDES[backend]
    if not possible:
        raise UserError(
            f"{field}.backend",
            backend,
            f"provides {_listed(PROVIDES[backend])}, and {who} requires {_listed(required)}.",
            "Use the backend hf, or another objective.",
        )
    if asked == "auto":
        return possible
    if asked not in required:
        raise UserError(f"{field}.signal", asked, f"is not what {who} requires.", f"Use {_listed(possible)}.")
    if asked not in possible:
        other = ", or the backend hf" if teacher.on_vllm else ""
        raise UserError(
            f"{field}.signal",
            asked,
            f"is not what a teacher on {backend} provides.",
            f"Use {_listed(possible)}{other}.",
        )
    return frozenset({SignalKind(asked)})


def signal_notes(config: Config) -> list[str]:
    """Where `signal: auto` loses something, because the backend can send no more."""
    of_each = zip(config.teacher_fields, config.all_teachers, check_signal(config), strict=False)
    return [
        f"{field}.signal = auto: vLLM sends no whole distributions, so it is top_k: the {teacher.top_k} tokens that "
        "the teacher finds most probable and some of the student's, all others in one bucket"
        for field, teacher, kinds in of_each
        if teacher.on_vllm and teacher.signal == "auto" and kinds == {SignalKind.TOP_K}
    ]


def choose_signals(config: Config, teachers: Sequence[Architecture], *, rows: int) -> tuple[SignalKind, ...]:
    """What the workers of each teacher send: the smallest of the kinds that would do. Empty where there are none.

    Args:
        config: the run's.
        teachers: the architectures of all teachers; none where they have no workers of their own.
        rows: V.

    Raises:
        UserError: as `check_signal`; or if hidden states have to be sent, and those of a teacher are not all that its
            logits are made of, or the objective reads them and the teachers' are of several widths.
    """
    possible = check_signal(config)
    if not teachers or not possible:
        return ()
    possible = tuple(
        kinds if teacher.head_alone else _without_hidden(field, own.model, kinds, teacher, _required(config)[1])
        for field, own, kinds, teacher in zip(
            config.teacher_fields, config.all_teachers, possible, teachers, strict=True
        )
    )
    widths = {teacher.hidden_size for teacher in teachers}
    if len(widths) > 1 and _reads_hidden(config):
        raise UserError(
            "teachers",
            ", ".join(str(teacher.hidden_size) for teacher in teachers),
            f"are the widths of their hidden states, which {_required(config)[1]} reads as one.",
            "Use teachers of one width.",
        )
    return tuple(_smallest(kinds, teacher, rows) for kinds, teacher in zip(possible, teachers, strict=True))


def _without_hidden(
    field: str, model: str | None, possible: frozenset[SignalKind], teacher: Architecture, who: str
) -> frozenset[SignalKind]:
    """The kinds that would do, but for hidden states: the teacher's logits are more than its head applied to them."""
    left = possible - {SignalKind.HIDDEN_STATES}
    if not left:
        raise UserError(
            f"{field}.model",
            model,
            f"is a {teacher.name}, whose logits are made of more than its head and its last hidden states, and hidden "
            f"states are to be sent to {who}.",
            "Set teacher.signal to full_logits if the objective takes them, or use another teacher or objective.",
        )
    return left


def _reads_hidden(config: Config) -> bool:
    return any(kinds == {SignalKind.HIDDEN_STATES} for kinds in in_each_stage(config, _required_in_stage))


def _smallest(possible: frozenset[SignalKind], teacher: Architecture, rows: int) -> SignalKind:
    if possible == WHOLE_DISTRIBUTION:
        return SignalKind.HIDDEN_STATES if teacher.hidden_size < rows else SignalKind.FULL_LOGITS
    return min(possible)


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
