"""A user's module with a mistake in it."""

value = undefined_name  # noqa: F821
