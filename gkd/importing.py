"""Plug-ins by import path: `"package.module:name"` or `"path/to/file.py:name"`.

Works inside any worker, with nothing registered beforehand.
"""

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from gkd.errors import UserError


def load_object(path: str, *, field: str) -> Any:
    """Import the object that `path` names.

    Args:
        path: `"package.module:name"`, or `"file.py:name"` for a file that is in no package.
        field: the config field that holds the path, for the error message.

    Raises:
        UserError: if the path is malformed, the module is missing or fails to import, or it has no such name.
    """
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise UserError(
            field, path, "is not an import path.", 'Write it as "package.module:name" or "path/to/file.py:name".'
        )
    try:
        module = _load_file(Path(module_name)) if module_name.endswith(".py") else importlib.import_module(module_name)
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


def absolute_path(path: str) -> str:
    """The same import path where the working directory is another: a file's path is made absolute."""
    file, separator, name = path.partition(":")
    return f"{Path(file).expanduser().absolute()}{separator}{name}" if file.endswith(".py") else path


def _load_file(file: Path) -> ModuleType:
    """Import a file under a name of its own, once per process."""
    resolved = file.resolve(strict=True)
    name = f"gkd_plugin_{resolved.stem}_{hashlib.sha256(str(resolved).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, resolved)
    assert spec is not None and spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
