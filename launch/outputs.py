"""Whether what a command will write can be written, asked before any work is done."""

import os
from pathlib import Path

from gkd.errors import UserError


def check_folder(folder: Path, *, field: str) -> None:
    """Refuse a folder that cannot be made or written.

    Raises:
        UserError: naming what stands in the way.
    """
    if folder.resolve() == Path.cwd():
        raise UserError(field, str(folder), "is the working directory.", "Name a folder of its own.")
    existing = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(field, str(folder), f"cannot be written: see {existing}.", "Choose another folder.")


def check_new_folder(folder: Path, *, field: str) -> None:
    """Refuse a folder that cannot be made or written, or that holds anything.

    Raises:
        UserError: naming what stands in the way.
    """
    check_folder(folder, field=field)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(field, str(folder.absolute()), "exists already.", "Name another folder, or remove it.")


def check_file(file: Path, *, field: str) -> None:
    """Refuse a file that cannot be written.

    Raises:
        UserError: if its folder is not there or may not be written, or a folder is in its place.
    """
    folder = file.absolute().parent
    if not folder.is_dir():
        raise UserError(field, str(file), "its folder does not exist.", "Make the folder, or name another.")
    if file.is_dir() or not os.access(file if file.exists() else folder, os.W_OK):
        raise UserError(field, str(file), "cannot be written.", "Name another file.")
