"""Errors that are the user's to mend: one message that names the field, the value and the cure."""


class UserError(ValueError):
    """A mistake in a config, a file or an argument. The command line prints it without a traceback and exits with 2."""

    def __init__(self, field: str, value: object, problem: str, cure: str) -> None:
        self.field = field
        self.value = value
        self.problem = problem
        self.cure = cure
        super().__init__(field, value, problem, cure)  # all four, so that it survives pickling between actors

    def __str__(self) -> str:
        return f"{self.field} = {self.value!r}: {self.problem} {self.cure}"


class NotBuiltYet(UserError):
    """A name that the schema reserves and this version does not build."""

    def __init__(self, field: str, value: object, cure: str) -> None:
        super().__init__(field, value, "is part of the schema but not built yet.", cure)

    def __reduce__(self) -> tuple[type, tuple[str, object, str]]:
        return type(self), (self.field, self.value, self.cure)


def unreadable(error: OSError | UnicodeDecodeError) -> str:
    """What is wrong with a file that cannot be read, for a message that names the file itself."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"cannot be read: {reason}."


class Interrupted(Exception):
    """The run was asked to stop and has saved a checkpoint."""
