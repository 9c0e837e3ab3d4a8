"""Rows of text and label from .csv and .jsonl files, and their split."""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unilora_ext.cli.errors import CliError
from unilora_ext.cli.files import read_records, shown

__all__ = ["Row", "RunData", "label_names", "read_rows", "split_rows", "write_rows"]


@dataclass(frozen=True)
class Row:
    """One text; its label's name, or None where labels were not asked for; where it came from."""

    text: str
    label: str | None
    where: str


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


def read_rows(path: str | Path, text_column: str, label_column: str | None, labels: Sequence[str] = ()) -> list[Row]:
    """All rows of a file, checked.

    Args:
        path: ``.csv`` with a header line, or ``.jsonl`` with one object a line; UTF-8.
        text_column: its name.
        label_column: its name; None: labels are not read.
        labels: where given, the only labels allowed.

    Raises:
        CliError: naming the file, the line, what was expected and what came.
    """
    columns = [text_column] + ([label_column] if label_column is not None else [])
    rows: list[Row] = []
    for where, record in read_records(path, (".csv", ".jsonl"), columns):
        text, label = record[text_column], None
        if not isinstance(text, str) or not text.strip():
            raise CliError(f"{where}: column '{text_column}': expected a text, got {shown(text)}")
        if label_column is not None:
            label = _label(where, label_column, record[label_column])
            if labels and label not in labels:
                raise CliError(
                    f"{where}: column '{label_column}': expected one of the labels {list(labels)}, got '{label}'"
                )
        rows.append(Row(text, label, where))
    if not rows:
        raise CliError(f"{path}: expected at least one row, got none")
    return rows


def _label(where: str, column: str, value: Any) -> str:
    """The label's name: a string, integer or boolean as text."""
    if isinstance(value, (str, int)) and str(value).strip():
        return str(value).strip()
    raise CliError(f"{where}: column '{column}': expected a label (a word or an integer), got {shown(value)}")


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


def split_rows(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(training, validation): drawn by `seed` within each label, so that both sides hold every label.

    Raises:
        CliError: a label with a single row.
    """
    generator = random.Random(seed)
    held_out: set[int] = set()
    for label in sorted({row.label for row in rows if row.label is not None}):
        members = [i for i, row in enumerate(rows) if row.label == label]
        if len(members) < 2:
            raise CliError(
                f"{rows[members[0]].where}: label '{label}': expected at least 2 rows, one to train and one "
                "to validate, got 1"
            )
        generator.shuffle(members)
        held_out.update(members[: min(len(members) - 1, max(1, round(fraction * len(members))))])
    training = [row for i, row in enumerate(rows) if i not in held_out]
    return training, [row for i, row in enumerate(rows) if i in held_out]


def write_rows(path: Path, rows: Sequence[Row], text_column: str, label_column: str) -> None:
    """Writes a .csv that :func:`read_rows` reads back unchanged."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([text_column, label_column])
        writer.writerows([row.text, row.label] for row in rows)
