"""Records of .csv, .jsonl and .txt files, each with the place it came from."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from unilora_ext.cli.errors import CliError, closest

__all__ = ["check_unicode", "read_records", "sha256", "shown"]

_LEVELS = 100
"""Objects and lists in one another; far deeper ones overflow the stack where they are read, shown or written."""


def read_records(
    path: str | Path, endings: Sequence[str], columns: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, record) of a file, one by one.

    Args:
        path: ``.csv`` with a header line, ``.jsonl`` with one object a line, or ``.txt`` with one text a line, which
            is a record of its only column; UTF-8. Blank lines are left out.
        endings: the kinds of file allowed.
        columns: names that every record must have; for ``.txt``, the one name.

    Raises:
        CliError: naming the file, the line, what was expected and what came.
    """
    path, allowed = Path(path), " or ".join([", ".join(endings[:-1]), endings[-1]])
    if not path.is_file():
        raise CliError(f"{path}: expected a {allowed} file, got {'a folder' if path.is_dir() else 'no such file'}")
    ending = path.suffix.lower()
    if ending not in endings:
        raise CliError(f"{path}: expected a file that ends in {allowed}, got '{path.suffix or path.name}'")
    try:
        yield from _READERS[ending](path, columns)
    except UnicodeDecodeError as error:
        raise CliError(f"{_first_undecodable(path)}: expected UTF-8 text, got other bytes ({error.reason})") from error


def _first_undecodable(path: Path) -> str:
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            line.decode()
        except UnicodeDecodeError:
            return f"{path}, line {number}"
    return str(path)


def _csv_records(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)  # the default refuses texts beyond 128 KiB
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        start = 1
        try:
            header = next(reader, None)
            if not header:
                raise CliError(
                    f"{path}: expected a header line with the columns {list(columns)}, got an empty line or file"
                )
            _check_columns(f"{path}, line 1", columns, header)
            start = reader.line_num + 1
            for values in reader:
                where, start = f"{path}, line {start}", reader.line_num + 1
                if not values:  # a blank line
                    continue
                if len(values) != len(header):
                    raise CliError(f"{where}: expected {len(header)} fields, as in the header, got {len(values)}")
                yield where, dict(zip(header, values, strict=True))
        except csv.Error as error:
            raise CliError(f"{path}, line {start}: expected CSV, got a record that cannot be read ({error})") from error


def _jsonl_records(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:  # ValueError: of a number of thousands of digits, too
                raise CliError(f"{where}: expected a JSON object, got {shown(line.strip())} ({error})") from error
            if line.count("[") + line.count("{") > _LEVELS and _deeper(record, _LEVELS):
                raise CliError(f"{where}: expected at most {_LEVELS} levels of objects and lists, got more")
            if "\\u" in line:
                check_unicode(json.dumps(record, ensure_ascii=False), where)
            if not isinstance(record, dict):
                raise CliError(f"{where}: expected a JSON object, got {shown(record)}")
            _check_columns(where, columns, record)
            yield where, record


def _txt_records(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}, line {number}", {columns[0]: line.rstrip("\n")}


_READERS = {".csv": _csv_records, ".jsonl": _jsonl_records, ".txt": _txt_records}


def _check_columns(where: str, columns: Sequence[str], got: Any) -> None:
    for column in columns:
        if column not in got:
            raise CliError(f"{where}: expected a column '{column}', got {list(got)}{closest(column, got)}")
    for column in columns:
        if list(got).count(column) > 1:
            raise CliError(f"{where}: expected the column '{column}' once, got it {list(got).count(column)} times")


def _deeper(value: Any, levels: int) -> bool:
    """Whether objects and lists lie deeper in one another."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_deeper(part, levels - 1) for part in parts)


def check_unicode(text: str, where: str) -> None:
    """Refuses half a character, such as JSON's ``\\ud83d`` alone, and bytes of a command line that are no text.

    Raises:
        CliError: showing it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        got = text[error.start : error.end]
        raise CliError(f"{where}: expected Unicode text, got a lone surrogate, {got!a}") from error


def shown(value: Any) -> str:
    """A value in an error message, cut short."""
    text = repr(value)
    return "nothing" if value in ("", None) else text if len(text) <= 60 else text[:57] + "..."


def sha256(path: str | Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
