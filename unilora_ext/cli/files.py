"""Records of .csv, .tsv, .jsonl and .txt files, each with the place it came from; and JSON as it is written."""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unilora_ext.cli.errors import CliError, closest

__all__ = ["TextFormat", "as_json", "check_unicode", "encoded", "read_records", "sha256", "shown"]

_LEVELS = 100
"""Objects and lists in one another; far deeper ones overflow the stack where they are read, shown or written."""


_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_SPELT = {"\\t": "\t", "tab": "\t"}
"""What a shell's user types for a tab."""


@dataclass(frozen=True)
class TextFormat:
    """How the files that a command reads are written: ``--encoding`` and ``--separator``.

    Attributes:
        encoding: Python's name of it; a byte order mark of UTF-8 is left out.
        separator: of fields in .csv and .tsv files, ``tab`` or ``\\t`` for a tab; None: a comma, and a tab in .tsv.

    Raises:
        CliError: an unknown encoding; not a single character, or one that ends lines or quotes.
    """

    encoding: str = "utf-8"
    separator: str | None = None

    def __post_init__(self) -> None:
        try:
            "a".encode(self.encoding)
        except (LookupError, ValueError) as error:  # ValueError: of a name with a null character
            raise CliError(
                f"--encoding: expected the name of a text encoding, such as utf-8, cp1252, latin-1 or utf-16, got "
                f"{self.encoding!r}"
            ) from error
        separator = self.separator
        if separator is not None and separator not in _SPELT and (len(separator) != 1 or separator in '"\r\n'):
            raise CliError(
                "--separator: expected a single character, such as ';' or '|', or tab; no quotation mark and no end of "
                f"a line; got {separator!r}"
            )

    @classmethod
    def of(cls, arguments: Namespace) -> TextFormat:
        """As a command line asks for it."""
        return cls(arguments.encoding, arguments.separator)

    @property
    def codec(self) -> str:
        """The encoding to open a file with."""
        return "utf-8-sig" if codecs.lookup(self.encoding).name == "utf-8" else self.encoding

    def delimiter(self, path: Path) -> str:
        """The separator of a table's file."""
        if self.separator is None:
            return _SEPARATORS[path.suffix.lower()]
        return _SPELT.get(self.separator, self.separator)

    def options(self) -> list[str]:
        """The words of a command line that ask for it; none for the default."""
        given = {"--encoding": self.encoding if self.encoding != "utf-8" else None, "--separator": self.separator}
        return [word for name, value in given.items() if value is not None for word in (name, value)]


def read_records(
    path: str | Path,
    endings: Sequence[str],
    columns: Sequence[str],
    form: TextFormat,
    whole: bool = False,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, record) of a file, one by one.

    Args:
        path: ``.csv`` or ``.tsv`` with a header line, ``.jsonl`` with one object a line, or ``.txt`` with one text a
            line, which is a record of its only column. Blank lines are left out.
        endings: the kinds of file allowed.
        columns: names that every record must have; for ``.txt``, the one name.
        form: encoding and separator of the file.
        whole: whether all columns of a table are used, so that each must have a name of its own.

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
        yield from _READERS[ending](path, columns, form, whole)
    except UnicodeError as error:  # UnicodeDecodeError, but for UTF-16 and UTF-32 without a byte order mark
        raise _undecodable(path, form) from error


def _undecodable(path: Path, form: TextFormat) -> CliError:
    """The error of a file that is not in the encoding asked for: where, and which to try."""
    data, where, reason = path.read_bytes(), str(path), "no byte order mark"
    try:
        data.decode(form.codec)
    except UnicodeDecodeError as error:
        before = error.object[: error.start].decode(form.codec, "ignore")
        where, reason = f"{path}, line {before.count(chr(10)) + 1}", error.reason
    except UnicodeError:
        pass
    other = "cp1252 (of Windows) or --encoding latin-1" if form.codec == "utf-8-sig" else "utf-8"
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        other = "utf-16"
    return CliError(
        f"{where}: expected {form.encoding.upper()} text, got other bytes ({reason}); try --encoding {other}, or save "
        "the file as UTF-8"
    )


def _table_records(
    path: Path, columns: Sequence[str], form: TextFormat, whole: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)  # the default refuses texts beyond 128 KiB
    with open(path, encoding=form.codec, newline="") as file:
        reader = csv.reader(file, strict=True, delimiter=form.delimiter(path))
        start = 1
        try:
            header = next(reader, None)
            if not header:
                raise CliError(
                    f"{path}: expected a header line with the columns {list(columns)}, got an empty line or file"
                )
            _check_header(f"{path}, line 1", columns, header, whole)
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


def _check_header(where: str, columns: Sequence[str], header: list[str], whole: bool) -> None:
    other = next((mark for mark in (";", "\t", "|", ",") if len(header) == 1 and mark in header[0]), None)
    if other is not None and header[0] not in columns:
        raise CliError(
            f"{where}: expected the columns {list(columns)}, got one column {shown(header[0])}; is it another "
            f"separator? Try --separator {'tab' if other == chr(9) else repr(other)}"
        )
    _check_columns(where, columns, header)
    for column in header if whole else columns:
        if header.count(column) > 1:
            raise CliError(f"{where}: expected the column '{column}' once, got it {header.count(column)} times")


def _jsonl_records(
    path: Path, columns: Sequence[str], form: TextFormat, whole: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(path, encoding=form.codec, newline="\n") as file:
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


def _txt_records(
    path: Path, columns: Sequence[str], form: TextFormat, whole: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(path, encoding=form.codec) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}, line {number}", {columns[0]: line.rstrip("\n")}


_READERS = {".csv": _table_records, ".tsv": _table_records, ".jsonl": _jsonl_records, ".txt": _txt_records}


def _check_columns(where: str, columns: Sequence[str], got: Any) -> None:
    for column in columns:
        if column not in got:
            raise CliError(f"{where}: expected a column '{column}', got {list(got)}{closest(column, got)}")


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


def as_json(value: Any, indent: int | None = 2) -> str:
    """JSON with all letters as they are, and a line's end; one line where `indent` is None."""
    return json.dumps(value, ensure_ascii=False, indent=indent) + "\n"


def encoded(text: str) -> bytes:
    """UTF-8. A lone surrogate, as in a file's name that is no text, becomes the escape that JSON has for it."""
    return text.encode("utf-8", "backslashreplace")


def shown(value: Any) -> str:
    """A value in an error message, cut short."""
    text = repr(value)
    return "nothing" if value in ("", None) else text if len(text) <= 60 else text[:57] + "..."


def sha256(path: str | Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
