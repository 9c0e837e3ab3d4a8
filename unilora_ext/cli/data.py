"""Rows of text and label from .csv, .tsv and .jsonl files, and their split."""

from __future__ import annotations

import csv
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import pvariance
from typing import Any

from unilora_ext.cli.errors import CliError
from unilora_ext.cli.files import TextFormat, read_records, shown

__all__ = [
    "IGNORED",
    "Row",
    "RunData",
    "label_entropy",
    "label_names",
    "label_variance",
    "read_rows",
    "read_table",
    "split_rows",
    "write_rows",
]

IGNORED = -100
"""The label of what is read and not learnt."""


@dataclass(frozen=True)
class Row:
    """One text, or two; its label, or None where labels were not asked for; where it came from."""

    text: str
    label: str | None
    where: str
    pair: str | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """As a tokenizer takes them."""
        return (self.text,) if self.pair is None else (self.text, self.pair)


@dataclass(frozen=True)
class RunData:
    """The checked data of a run: rows of text and label, or records of a causal language model.

    Attributes:
        labels: of a classifier; else empty.
        training, validation, test: the three parts.
        counts: what became of each part's records, where there is something to tell.
    """

    labels: list[str]
    training: Sequence[Any]
    validation: Sequence[Any]
    test: Sequence[Any]
    counts: dict[str, dict[str, int]] = field(default_factory=dict)


def read_rows(
    path: str | Path,
    text_column: str,
    label_column: str,
    labels: Sequence[str] = (),
    form: TextFormat = TextFormat(),  # noqa: B008 (frozen)
    pair_column: str | None = None,
    numbers: bool = False,
) -> list[Row]:
    """All rows of a file, checked.

    Args:
        path: ``.csv`` or ``.tsv`` with a header line, or ``.jsonl`` with one object a line.
        text_column: its name.
        label_column: its name.
        labels: where given, the only labels allowed.
        form: encoding and separator of the file.
        pair_column: of a second text, if there is one.
        numbers: whether the labels are numbers to regress on, not classes.

    Raises:
        CliError: naming the file, the line, what was expected and what came.
    """
    rows: list[Row] = []
    texts = _text_columns(text_column, pair_column)
    read_label = _number if numbers else _label
    for where, record in _records(path, [*texts, label_column], form):
        label = read_label(where, label_column, record[label_column])
        if labels and label not in labels:
            raise CliError(
                f"{where}: column '{label_column}': expected one of the labels {list(labels)}, got '{label}'"
            )
        rows.append(_row(where, texts, record, label))
    return rows


def read_table(
    path: str | Path, text_column: str, form: TextFormat, pair_column: str | None = None
) -> tuple[list[Row], list[dict[str, Any]]]:
    """(rows without labels, whole records) of a file as :func:`read_rows` takes it.

    Raises:
        CliError: as there; two columns of the same name.
    """
    texts = _text_columns(text_column, pair_column)
    records = list(_records(path, texts, form, whole=True))
    rows = [_row(where, texts, record, None) for where, record in records]
    return rows, [record for _, record in records]


def _records(
    path: str | Path, columns: Sequence[str], form: TextFormat, whole: bool = False
) -> Iterator[tuple[str, dict[str, Any]]]:
    """:func:`read_records` of at least one row."""
    empty = True
    for found in read_records(path, (".csv", ".tsv", ".jsonl"), columns, form, whole):
        empty = False
        yield found
    if empty:
        raise CliError(f"{path}: expected at least one row, got none")


def _text_columns(text_column: str, pair_column: str | None) -> list[str]:
    return [text_column] if pair_column is None else [text_column, pair_column]


def _row(where: str, columns: Sequence[str], record: dict[str, Any], label: str | None) -> Row:
    text, *pair = (_text(where, column, record[column]) for column in columns)
    return Row(text, label, where, *pair)


def _text(where: str, column: str, value: Any) -> str:
    if isinstance(value, str) and value.strip():
        return value
    raise CliError(f"{where}: column '{column}': expected a text, got {shown(value)}")


def _label(where: str, column: str, value: Any) -> str:
    """The label's name: a string, integer or boolean as text."""
    if isinstance(value, (str, int)) and str(value).strip():
        return str(value).strip()
    raise CliError(f"{where}: column '{column}': expected a label (a word or an integer), got {shown(value)}")


def _number(where: str, column: str, value: Any) -> str:
    """A finite number, as text that reads back unchanged."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or number == IGNORED:
        raise CliError(f"{where}: column '{column}': expected a finite number other than {IGNORED}, got {shown(value)}")
    return repr(number)


def label_names(rows: Sequence[Row], where: str) -> list[str]:
    """The labels in their order: by number if all are integers, else by name.

    Raises:
        CliError: fewer than two, or one for nearly every row (then it is hardly a label).
    """
    names = sorted({row.label for row in rows if row.label is not None})
    if len(names) < 2:
        raise CliError(f"{where}: expected at least 2 different labels, got only {names}")
    if len(names) > max(2, len(rows) // 2):
        raise CliError(
            f"{where}: expected labels that repeat, got {len(names)} different ones in {len(rows)} rows "
            f"(such as '{names[0]}'): is this the label column?"
        )
    try:
        return sorted(names, key=int)
    except ValueError:
        return names


def label_variance(rows: Sequence[Row]) -> float:
    """Mean squared error of the answer that knows nothing but the labels' mean."""
    return pvariance([float(row.label or "nan") for row in rows])


def label_entropy(rows: Sequence[Row]) -> float:
    """Cross-entropy of the answer that knows nothing but the labels' shares."""
    counts = Counter(row.label for row in rows).values()
    return -sum(count / len(rows) * math.log(count / len(rows)) for count in counts)


def split_rows(rows: Sequence[Row], fraction: float, seed: int, by_label: bool = True) -> tuple[list[Row], list[Row]]:
    """(training, validation): drawn by `seed` within each label, so that both sides hold every label; of numbers
    (`by_label` is false), from all rows.

    Raises:
        CliError: a label with a single row.
    """
    generator = random.Random(seed)
    held_out: set[int] = set()
    groups = [row.label if by_label else "a number" for row in rows]
    for label in sorted({label for label in groups if label is not None}):
        members = [i for i, group in enumerate(groups) if group == label]
        if len(members) < 2:
            raise CliError(
                f"{rows[members[0]].where}: label '{label}': expected at least 2 rows, one to train and one "
                "to validate, got 1"
            )
        generator.shuffle(members)
        held_out.update(members[: min(len(members) - 1, max(1, round(fraction * len(members))))])
    training = [row for i, row in enumerate(rows) if i not in held_out]
    return training, [row for i, row in enumerate(rows) if i in held_out]


def write_rows(
    path: Path, rows: Sequence[Row], text_column: str, label_column: str, pair_column: str | None = None
) -> None:
    """Writes a .csv that :func:`read_rows` reads back unchanged."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*_text_columns(text_column, pair_column), label_column])
        writer.writerows([*row.texts, row.label] for row in rows)
