"""``unilora finetune``: from rows of text and label to the best adapter and a report."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unilora_ext.checkpoint import replace_file
from unilora_ext.cli import checkpoints
from unilora_ext.cli.data import Row, label_names, read_rows, sha256, split_rows, write_rows
from unilora_ext.cli.errors import CliError, need
from unilora_ext.cli.settings import Settings, option_name, read_run, run_record

__all__ = ["command", "run"]

WRITTEN = ("adapter", "checkpoints", "report", "validation.csv", "run.json")
"""What a run writes into its folder; ``--overwrite`` deletes these and nothing else."""


def command(arguments: Namespace) -> None:
    """``unilora finetune`` with parsed arguments."""
    given = dict(vars(arguments))
    resume, overwrite = given.pop("resume", None), given.pop("overwrite", False)
    if resume is not None:
        if overwrite or given:
            names = ", ".join(option_name(name) for name in [*given, *(["overwrite"] if overwrite else [])])
            raise CliError(f"--resume {resume}: expected no other setting, the run keeps its own; got {names}")
        settings, facts = read_run(Path(resume))
        run(settings, facts)
        return
    for name, what in (("model", "a model folder or hub name"), ("data", "a file")):
        if name not in given:
            raise CliError(f"{option_name(name)}: expected {what}, got nothing (to go on with a run: --resume FOLDER)")
    run(Settings(**given), overwrite=overwrite)


@dataclass(frozen=True)
class Rows:
    """The checked data of a run."""

    labels: list[str]
    training: list[Row]
    validation: list[Row]
    test: list[Row]


def run(settings: Settings, resumed: dict[str, Any] | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Trains, or goes on with a run.

    Args:
        settings: of the run.
        resumed: the facts of ``run.json`` when a run is continued.
        overwrite: whether a run in the same folder is replaced.

    Returns:
        The content of ``report/metrics.json``.

    Raises:
        CliError: wrong settings, data or model; nothing has been changed then.
    """
    need("transformers", "accelerate", "matplotlib")
    output = Path(settings.output)
    if resumed is None:
        check_output(output, overwrite, [settings.data, settings.validation, settings.test])
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise CliError(
            f"WORLD_SIZE: expected one process, got {os.environ['WORLD_SIZE']}: start unilora without a launcher"
        )
    rows = read_data(settings)
    settings = settings.absolute()
    facts = {"files": {path: sha256(path) for path in (settings.data, settings.validation, settings.test) if path}}
    if resumed is not None and resumed.get("files") != facts["files"]:
        changed = [path for path, digest in facts["files"].items() if resumed.get("files", {}).get(path) != digest]
        raise CliError(
            f"--resume {output}: expected the data the run began with, got changed files: {', '.join(changed)}"
        )
    finished = output / "report" / "metrics.json"
    if resumed is not None and finished.is_file():
        print(f"{output}: this run is complete already; see {finished}")
        return json.loads(finished.read_text(encoding="utf-8"))

    from unilora_ext.cli.training import prepare, train  # PyTorch and Transformers, once all else is known to be good

    classifier = prepare(settings, rows.labels)
    with _alone(output, create=resumed is None):
        if resumed is None:
            for name in WRITTEN:
                path = output / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            replace_file(output / "run.json", run_record(settings, facts))
        write_rows(output / "validation.csv", rows.validation, settings.text_column, settings.label_column)
        for path in checkpoints.remove_incomplete(output / "checkpoints"):
            print(f"removed {path}: its saving was interrupted")
        started = time.perf_counter()
        try:
            return train(settings, classifier, rows, output, started)
        except KeyboardInterrupt:
            print(f"\nInterrupted. Go on with: unilora finetune --resume {shlex.quote(settings.output)}")
            raise


def read_data(settings: Settings) -> Rows:
    """All rows, split and checked."""
    columns = (settings.text_column, settings.label_column)
    training = read_rows(settings.data, *columns)
    labels = label_names(training, f"{settings.data}, column '{settings.label_column}'")
    if settings.validation is not None:
        validation = read_rows(settings.validation, *columns, labels)
    else:
        training, validation = split_rows(training, settings.validation_fraction, settings.seed)
    test = read_rows(settings.test, *columns, labels) if settings.test is not None else []
    return Rows(labels, training, validation, test)


def check_output(output: Path, overwrite: bool, inputs: list[str | None]) -> None:
    """Refuses a folder that holds something else, or a run without ``--overwrite``.

    Args:
        output: the folder.
        overwrite: whether a run in it may be replaced.
        inputs: files that must survive.
    """
    if output.exists() and not output.is_dir():
        raise CliError(f"--output {output}: expected a folder, got a file")
    names = {path.name for path in output.iterdir() if not path.name.endswith(".tmp")} if output.is_dir() else set()
    if not names:
        parent = next(path for path in (output, *output.absolute().parents) if path.exists())
        if not os.access(parent, os.W_OK):
            raise CliError(f"--output {output}: expected a place that can be written to, got {parent}, which cannot")
        return
    foreign = names - set(WRITTEN) - {"train.csv", "test.csv"}  # the demo's
    if foreign and "run.json" not in names:
        raise CliError(
            f"--output {output}: expected an empty folder, or one of an earlier run, got one with {sorted(foreign)[:5]}"
        )
    if not overwrite:
        raise CliError(
            f"--output {output}: expected an empty folder, got one that holds a run; go on with it "
            f"('unilora finetune --resume {output}'), replace it (--overwrite) or choose another folder"
        )
    for path in filter(None, inputs):
        inside = Path(path).resolve()
        if any(inside.is_relative_to((output / name).resolve()) for name in WRITTEN):
            raise CliError(
                f"--overwrite: {path}: expected data outside of what is replaced, got a file of the run itself"
            )


@contextmanager
def _alone(output: Path, create: bool) -> Iterator[None]:
    """Keeps a second process out of the folder; the lock ends with the process, however that ends."""
    if create:
        output.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(output, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CliError(f"--output {output}: expected no other process in this folder, got one at work") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)
