"""Plug-ins by import path: `"package.module:name"`. Works inside any worker, with nothing registered beforehand."""

import importlib
from typing import Any

from gkd.errors import UserError


def load_object(path: str, *, field: str) -> Any:
    """Import the object that `path` names.

    Args:
        path: `"package.module:name"`.
        field: the config field that holds the path, for the error message.

    Raises:
        UserError: if the path is malformed, the module is missing or fails to import, or it has no such name.
    """
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise UserError(field, path, "is not an import path.", 'Write it as "package.module:name".')
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's own module may fail in any way
        raise UserError(
            field,
            path,
            f"cannot be imported: {type(error).__name__}: {error}.",
            "Put the file's folder on PYTHONPATH, or correct the path or the file.",
        ) from error
    if not hasattr(module, name):
        raise UserError(field, path, f"module {module_name} has no {name!r}.", "Correct the name after the colon.")
    return getattr(module, name)
