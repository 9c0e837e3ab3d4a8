"""The rows of all runs, a file for each task, written as each run ends."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from protocol import Run

__all__ = ["RESULTS", "Rows"]

RESULTS = Path(__file__).resolve().parent.parent / "results"


class Rows(dict[Run, Mapping[str, Any]]):
    """Rows by run, as the files have them."""

    def __init__(self) -> None:
        super().__init__()
        for path in sorted(RESULTS.glob("quality-*.csv")):
            with open(path, newline="") as file:
                for row in csv.DictReader(file):
                    self._keep({name: _value(text) for name, text in row.items()})

    @property
    def seconds(self) -> float:
        """CPU seconds of all runs."""
        return sum(row["seconds"] for row in self.values())

    def append(self, row: Mapping[str, Any]) -> None:
        """Keeps a row, in its file at once."""
        path = RESULTS / f"quality-{row['task']}.csv"
        new = not path.exists()
        with open(path, "a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)
        self._keep(row)

    def _keep(self, row: Mapping[str, Any]) -> None:
        self[Run(**{field.name: row[field.name] for field in fields(Run)})] = row


def _value(text: str) -> Any:
    if text == "":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
