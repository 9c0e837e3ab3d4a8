"""Checkpoints of a run: whole or ignored.

A checkpoint counts from the moment its marker exists. The marker is written last, in one step, and lists every file
with its size; it is removed first when a checkpoint is deleted or written anew. So a process killed at any moment
leaves checkpoints that are whole, and leftovers that are told apart from them.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from unilora_ext.cli.files import as_json, encoded
from unilora_ext.files import replace_file

__all__ = ["MARKER", "latest", "mark_complete", "prune", "read_marker", "remove_incomplete", "unmark"]

MARKER = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def mark_complete(checkpoint: Path, facts: dict[str, Any]) -> None:
    """Declares a checkpoint whole; `facts` are kept in the marker."""
    files = {
        str(path.relative_to(checkpoint)): path.stat().st_size
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != MARKER
    }
    replace_file(checkpoint / MARKER, encoded(as_json({"files": files, **facts})))


def unmark(checkpoint: Path) -> None:
    """Declares a checkpoint not whole: before it is changed."""
    (checkpoint / MARKER).unlink(missing_ok=True)


def read_marker(checkpoint: Path) -> dict[str, Any] | None:
    """The marker's facts; None if the checkpoint is not whole."""
    try:
        facts = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
        whole = all((checkpoint / name).stat().st_size == size for name, size in facts["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return facts if whole else None


def _all(folder: Path) -> dict[int, Path]:
    """Checkpoint folders by step, ascending."""
    found = {int(m[1]): path for path in folder.glob("checkpoint-*") if (m := _NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


def latest(folder: Path) -> Path | None:
    """The whole checkpoint with the most steps."""
    return next((path for path in reversed(_all(folder).values()) if read_marker(path) is not None), None)


def remove_incomplete(folder: Path) -> list[Path]:
    """Deletes what a killed process left of checkpoints; returns their paths."""
    removed = [path for path in _all(folder).values() if read_marker(path) is None]
    for path in removed:
        shutil.rmtree(path)
    return removed


def prune(folder: Path, keep: set[int]) -> None:
    """Deletes all checkpoints but those of the steps in `keep`."""
    for step, path in _all(folder).items():
        if step not in keep:
            unmark(path)
            shutil.rmtree(path)
