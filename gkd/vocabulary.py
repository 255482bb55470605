"""Which rows of the two heads mean the same token, and whether two tokenizers are one.

Model heads are padded past the tokenizer (151,936 against 152,064 rows for one and the same tokenizer), so rows beyond
it mean nothing and must not enter the loss.
"""

from typing import Any

from gkd.errors import UserError


def tokenizer_size(tokenizer: Any) -> int:
    """One more than the largest id that means something."""
    return max(tokenizer.get_vocab().values()) + 1


def shared_tokens(student: Any, teacher: Any, *, teacher_path: str, field: str) -> int:
    """How many leading ids mean the same token in both tokenizers: all of the smaller one's.

    One may know more special tokens than the other, appended after the common ones; those stay out of rollouts and
    loss.

    Args:
        student: the student's tokenizer (anything with `get_vocab()`).
        teacher: the teacher's.
        teacher_path: for the message.
        field: the config field that named the teacher, for the message.

    Raises:
        UserError: if a common id means different tokens, naming the first ones.
    """
    size = min(tokenizer_size(student), tokenizer_size(teacher))
    ours, theirs = ({i: token for token, i in t.get_vocab().items() if i < size} for t in (student, teacher))
    different = sorted(i for i in ours.keys() | theirs.keys() if ours.get(i) != theirs.get(i))
    if different:
        examples = ", ".join(f"{i} is {ours.get(i)!r} and {theirs.get(i)!r}" for i in different[:3])
        raise UserError(
            field,
            teacher_path,
            f"has another tokenizer than the student: {len(different)} of {size} common ids differ (for example "
            f"{examples}).",
            "Token-level distillation compares distributions over the same tokens: use a teacher of the student's "
            "family.",
        )
    return size


def shared_rows(student_rows: int, teacher_rows: int | None, num_tokens: int) -> int:
    """Rows of both heads that the loss uses: the first min(V_student, V_teacher, tokens that both know)."""
    rows = min(student_rows, num_tokens)
    return rows if teacher_rows is None else min(rows, teacher_rows)
