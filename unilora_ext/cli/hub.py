"""Data sets of the hub, or copies of them in a folder, as files that a run reads."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Formatter
from typing import Any

from unilora_ext.cli.errors import CliError, RunError, need
from unilora_ext.cli.files import as_json, encoded
from unilora_ext.cli.recipe import HubData
from unilora_ext.files import replace_file

__all__ = ["write_data"]


def write_data(data: HubData, source: str | None, columns: Sequence[str], folder: Path) -> dict[str, str]:
    """Writes each split to ``folder`` as ``.jsonl``.

    Args:
        data: what to read.
        source: a folder with a copy of the data set (of its repository on the hub, or as ``datasets`` saved it); None:
            the hub.
        columns: to write, where the rows are taken as they are.
        folder: of the files; it is made.

    Returns:
        The file of each split, by the setting that takes it.

    Raises:
        CliError: ``datasets`` is missing, the data set cannot be had, or lacks a column.
    """
    need("datasets")
    written = {}
    loaded = {part: _load(data, source, split) for part, split in data.splits.items()}
    for part, rows in loaded.items():
        where = f"{source or data.hub}, split {data.splits[part]}"
        used = list(columns)
        if data.completion:
            used = [name for template in (*data.prompts, data.completion) for name in _fields(template)]
        missing = [name for name in used if name not in rows.column_names]
        if missing:
            raise CliError(f"{where}: expected a column '{missing[0]}', got {rows.column_names}")
    for part, rows in loaded.items():
        if data.completion:
            records: Iterable[dict[str, Any]] = map(_completed(data), rows)
        else:
            records = _plain(rows.select_columns(list(columns)), folder / part)
        path = folder / f"{part}.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(path, encoded("".join(as_json(record, indent=None) for record in records)))
        except OSError as error:
            raise RunError(f"{path}: expected to write the data there, got: {error}") from error
        written[part] = str(path)
    return written


def _load(data: HubData, source: str | None, split: str) -> Any:
    import datasets

    name, config = data.hub, data.config
    if source is not None:
        name = source
        if os.path.isfile(os.path.join(source, "dataset_dict.json")):
            # save_to_disk's format has no way to take a part of a split.
            base, _, part = split.partition("[:")
            return _part(datasets.load_from_disk(source), base, part, source)
        if config is not None and os.path.isdir(os.path.join(source, config)):
            name = os.path.join(source, config)
        config = None
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # of every kind: no network, no such name, a file that cannot be read
        what = data.hub + (f" ({data.config})" if data.config else "")
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        if source is not None:
            raise CliError(f"--data {source}: expected a copy of the data set {what}, got: {reason}") from error
        raise CliError(
            f"expected the data set {what} from the hub, got: {reason}; where the hub cannot be reached, give a copy: "
            "--data FOLDER (of its repository, or as datasets' save_to_disk wrote it), and of the model: --model FOLDER"
        ) from error
    finally:
        if bars:
            datasets.enable_progress_bars()


def _plain(rows: Any, folder: Path) -> Iterable[dict[str, Any]]:
    """Rows, with the names of files in place of images, which are written to `folder` as they are encoded."""
    import datasets

    images = [name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    for name in images:
        rows = rows.cast_column(name, datasets.Image(decode=False))
        folder.mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(rows):
        for name in images:
            image, path = row[name], row[name]["path"]
            file = folder / f"{number}{Path(path or '.png').suffix or '.png'}"
            file.write_bytes(Path(path).read_bytes() if image["bytes"] is None else image["bytes"])
            row[name] = str(file.absolute())
        yield row


def _part(splits: Any, base: str, part: str, source: str) -> Any:
    if base not in splits:
        raise CliError(f"--data {source}: expected a split '{base}', got {list(splits)}")
    rows = splits[base]
    return rows.select(range(min(int(part.rstrip("]")), len(rows)))) if part else rows


def _fields(template: str) -> list[str]:
    return [name for _, name, _, _ in Formatter().parse(template) if name]


def _completed(data: HubData) -> Any:
    """A row as prompt and completion."""

    def completed(row: dict[str, Any]) -> dict[str, str]:
        prompt = next((p for p in data.prompts if all(row[name] for name in _fields(p))), data.prompts[-1])
        return {"prompt": prompt.format_map(row), "completion": data.completion.format_map(row)}

    return completed
