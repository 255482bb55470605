"""Which rows of the two heads mean the same token, and whether two tokenizers are one.

Model heads are padded past the tokenizer (151,936 against 152,064 rows for one and the same tokenizer), so rows beyond
it mean nothing and must not enter the loss.
"""

from typing import Any

from gkd.errors import UserError


def shared_rows(student_rows: int, teacher_rows: int | None, tokenizer_size: int) -> int:
    """Rows of both heads that the loss uses: the first min(V_student, V_teacher, tokenizer size)."""
    rows = min(student_rows, tokenizer_size)
    return rows if teacher_rows is None else min(rows, teacher_rows)


def require_same_tokenizer(student: Any, teacher: Any, *, teacher_path: str) -> None:
    """Refuse two tokenizers that give the same id to different tokens.

    Args:
        student: the student's tokenizer (anything with `get_vocab()`).
        teacher: the teacher's.
        teacher_path: for the message.

    Raises:
        UserError: naming the first differences.
    """
    student_vocab, teacher_vocab = student.get_vocab(), teacher.get_vocab()
    if student_vocab == teacher_vocab:
        return
    only_one = student_vocab.keys() ^ teacher_vocab.keys()
    moved = [t for t in student_vocab.keys() & teacher_vocab.keys() if student_vocab[t] != teacher_vocab[t]]
    examples = ", ".join(repr(token) for token in sorted([*only_one, *moved])[:3])
    raise UserError(
        "teacher.model",
        teacher_path,
        f"has another tokenizer than the student: {len(only_one)} tokens are in one only and {len(moved)} have other "
        f"ids (for example {examples}).",
        "Token-level distillation compares distributions over the same tokens: use a teacher of the student's family.",
    )
