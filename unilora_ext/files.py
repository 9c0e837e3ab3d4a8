"""Files that are replaced in one step, and folders that one process at a time writes."""

from __future__ import annotations

import os
import re
import secrets
import stat
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from unilora_ext.errors import AdapterFileError, UniLoRAError

try:
    import fcntl
except ImportError:  # not a POSIX system: as a file system without locks
    fcntl = None

__all__ = ["locked", "open_file", "read_all", "replace_file", "sweep"]

PATIENCE = 300.0
"""Seconds that a writer waits for another one."""
STALE = 3600.0
"""Seconds after which a file that nothing names is taken for a leftover where there are no locks."""


def replace_file(path: Path, data: bytes) -> None:
    """Writes beside, flushes to the disk, then renames: `path` is the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # not every file system can flush a folder, and the new file is in place
        _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """The names in it, so that of two renames the first one survives a power failure if the second one does."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Makes `folder` if it is missing, and keeps other writers out of it, processes and threads, for the block.

    The lock is on the folder itself: no file is made for it, and it ends with its process. Readers take none.

    Yields:
        Whether the lock is held. Some network file systems have none; the writer is then careful (:func:`sweep`).

    Raises:
        UniLoRAError: another writer holds it for minutes.
        OSError: the folder cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # writable, not readable
        yield False
        return
    try:
        held = _acquire(descriptor, folder)
        try:
            yield held
        finally:
            if held:  # at once, though a process forked meanwhile has the descriptor too
                fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, folder: Path) -> bool:
    if fcntl is None:
        return False
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise UniLoRAError(
                    f"{folder}: expected to write into it, got another process that has it locked for {PATIENCE:g} s"
                ) from None
            time.sleep(0.005)
        except OSError:  # no locks here
            return False


def sweep(folder: Path, pattern: re.Pattern[str], kept: Collection[str], alone: bool) -> None:
    """Removes files that nothing names any more: superseded ones and what killed processes left.

    Args:
        folder: in it, no deeper.
        pattern: of the whole name.
        kept: names that stay.
        alone: whether :func:`locked` holds the lock; without it, another writer may be about to name a young file.
    """
    for path in folder.iterdir():
        if path.name not in kept and pattern.fullmatch(path.name):
            with suppress(OSError):  # the next writer's then
                if alone or time.time() - path.stat().st_mtime > STALE:
                    path.unlink()


def open_file(path: Path, missing: str) -> BinaryIO:
    """An adapter's file, open for reading.

    Args:
        path: of it.
        missing: what to say where there is none.

    Raises:
        AdapterFileError: it is missing, not a regular file, or cannot be read.
    """
    try:
        if stat.S_ISREG(os.stat(path).st_mode):  # open() would wait for a FIFO
            return open(path, "rb")
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a null character in the path
        raise AdapterFileError(missing) from None
    except OSError as error:
        raise AdapterFileError(f"{path}: expected a readable file, got: {error.strerror}") from error
    raise AdapterFileError(f"{path}: expected a regular file, got a folder or a device")


def read_all(path: Path, file: BinaryIO) -> bytes:
    """The rest of an open file; `path` is for the message.

    Raises:
        AdapterFileError: it cannot be read.
    """
    try:
        return file.read()
    except OSError as error:
        raise AdapterFileError(f"{path}: expected a readable file, got: {error.strerror}") from error
