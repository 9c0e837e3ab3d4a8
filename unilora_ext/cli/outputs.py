"""Files that a command writes where its user says: ``--json`` and the ``--output`` of records."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

from unilora_ext.cli.errors import CliError, RunError
from unilora_ext.cli.files import encoded
from unilora_ext.files import replace_file

__all__ = ["check_target", "write"]

_REFUSED = {stat.S_IFDIR: "a folder", stat.S_IFBLK: "a disk", stat.S_IFSOCK: "a socket"}


def check_target(path: str | None, source: str | None, option: str = "--json") -> None:
    """Refuses, before any work, what :func:`write` could not write to or must not.

    Args:
        path: of the file, a FIFO or a character device such as /dev/null; None: nothing is to be written.
        source: the command's input, which must survive.
        option: that gave `path`.

    Raises:
        CliError: a folder, disk or socket; the input; a place that is missing or read-only.
    """
    if path is None:
        return
    target = Path(path)
    kind = _kind(target)
    parent = Path(os.path.realpath(path)).parent
    if kind in _REFUSED or (kind is None and not parent.is_dir()):
        got = _REFUSED.get(kind, f"no folder {target.parent if not target.is_symlink() else parent}")
        raise CliError(f"{option} {path}: expected the name of a file in an existing folder, got {got}")
    if source is not None and kind is not None and target.samefile(source):
        raise CliError(f"{option} {path}: expected another file than the input, got the same")
    if not os.access(parent if kind in (None, stat.S_IFREG) else target, os.W_OK):
        raise CliError(f"{option} {path}: expected a place that can be written to, got one that cannot")


def write(path: str, text: str) -> None:
    """Writes a file in one step: the old content or the new one, whatever happens. A symbolic link stays, and what it
    points to is written; what is no regular file (a FIFO, a device, standard output) takes the bytes as they come.

    Raises:
        RunError: it cannot be written.
    """
    try:
        _write(Path(path), encoded(text))
    except BrokenPipeError:
        raise
    except OSError as error:
        raise RunError(f"{path}: expected to write {len(text):,} characters there, got: {error.strerror}") from error


def _write(target: Path, data: bytes) -> None:
    printed = next((descriptor for descriptor in (1, 2) if _is_open_as(target, descriptor)), None)
    if printed is None and _kind(target) in (None, stat.S_IFREG):
        return replace_file(Path(os.path.realpath(target)), data)
    if sys.stdout is not None:
        sys.stdout.flush()  # what was printed comes first
    with open(target if printed is None else printed, "wb", closefd=printed is None) as file:
        file.write(data)


def _is_open_as(path: Path, descriptor: int) -> bool:
    """Whether what is printed goes to `path`: it may be a regular file, which must not be replaced then."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False


def _kind(path: Path) -> int | None:
    """The kind of file, links followed; None: there is none.

    Raises:
        OSError: it cannot be told, such as of a link to itself.
    """
    try:
        return stat.S_IFMT(os.stat(path).st_mode)
    except FileNotFoundError:
        return None
