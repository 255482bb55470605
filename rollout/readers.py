"""The formats that records come in: each is read into plain dictionaries, with a name for every place."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gkd.config.data import DataSource
from gkd.errors import UserError, unreadable


def rows(source: DataSource, *, field: str) -> Iterator[tuple[str, Any]]:
    """Where each row is, in words, and what it holds.

    Args:
        source: the file, folder or dataset.
        field: the config field or argument that named it, for messages.

    Raises:
        UserError: if the source or one of its lines cannot be read.
    """
    match source.resolved_format:
        case "jsonl":
            return _read_jsonl(source, field)
        case "parquet":
            return _read_parquet(source, field)
        case "hub":
            return _read_dataset(source, field)


def _read_jsonl(source: DataSource, field: str) -> Iterator[tuple[str, Any]]:
    try:
        # Not splitlines(): it also splits at characters that JSON allows inside strings (U+2028).
        lines = Path(source.path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(field, source.path, unreadable(error), "Give a UTF-8 JSONL file.") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{source.path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(field, place, f"is not valid JSON: {error}.", "Write one JSON object a line.") from None
        yield place, row


def _read_parquet(source: DataSource, field: str) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        dataset = pyarrow.parquet.ParquetDataset(source.path)
        columns = _used(source, dataset.schema.names, field)
        table = dataset.read(columns=columns)
    except (OSError, pyarrow.ArrowException) as error:
        reason = _one_line(error)
        raise UserError(field, source.path, f"cannot be read: {reason}.", "Give a Parquet file.") from None
    number = 0
    for batch in table.to_batches(max_chunksize=4096):
        for row in batch.to_pylist():
            number += 1
            yield f"{source.path}, row {number}", row


def _read_dataset(source: DataSource, field: str) -> Iterator[tuple[str, Any]]:
    import datasets  # takes a while, and most runs read files

    datasets.disable_progress_bars()  # they would come between the lines of the run's own display
    path = Path(source.path)
    if path.is_file():
        raise UserError(
            field, source.path, "is a file whose name does not tell its format.", "Set format: jsonl or parquet."
        )
    if not path.exists() and (path.is_absolute() or source.path.startswith((".", "~")) or source.path.count("/") > 1):
        raise UserError(field, source.path, "does not exist.", "Correct the path; ~ is not expanded.")
    saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
    if saved and source.subset is not None:
        raise UserError(field, source.path, "was written by save_to_disk and has no subsets.", "Remove subset.")
    try:
        if saved:
            dataset = datasets.load_from_disk(source.path)
        else:
            dataset = datasets.load_dataset(source.path, source.subset, split=source.split)
    except Exception as error:  # loaders of many formats raise whatever they like, all of it about this dataset
        raise UserError(
            field,
            source.path,
            f"cannot be read as a folder of data or a Hugging Face dataset: {_one_line(error)}.",
            "Correct the name, or its subset and split; without a connection, download it before and give its folder.",
        ) from None
    if saved:
        dataset = _split_of(dataset, source, field)
    columns = _used(source, dataset.column_names, field)
    for number, row in enumerate(dataset.with_format(None).select_columns(columns), start=1):
        yield f"{source.path}, row {number}", row


def _split_of(saved: Any, source: DataSource, field: str) -> Any:
    """The split asked for; a dataset that was saved without others around it needs no name."""
    splits = saved if isinstance(saved, dict) else {str(saved.split): saved, "train": saved}
    if source.split not in splits:
        raise UserError(
            field, source.path, f"has no split {source.split!r}.", f"Set split to one of: {', '.join(splits)}."
        )
    return splits[source.split]


def _used(source: DataSource, columns: list[str], field: str) -> list[str]:
    """The columns that a record is made of, so that no others are decoded."""
    known = (source.prompt_field, source.completion_field, source.messages_field)
    used = [c for c in (*known, source.text_field, source.teacher_prompt_field, source.teacher_field) if c in columns]
    if not {source.prompt_field, source.messages_field, source.text_field}.intersection(used):
        raise UserError(
            field,
            source.path,
            f"has no column {source.prompt_field!r}, {source.messages_field!r} or {source.text_field!r}; it has: "
            f"{', '.join(columns)}.",
            "Name the columns with prompt_field, completion_field, messages_field or text_field.",
        )
    return used


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} ..."
