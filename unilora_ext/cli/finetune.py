"""``unilora finetune``: from rows to the best adapter and a report."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from unilora_ext.cli import checkpoints, distributed
from unilora_ext.cli.conversations import read_conversations, split_conversations, write_conversations
from unilora_ext.cli.data import RunData, label_names, read_rows, split_rows, write_rows
from unilora_ext.cli.errors import CliError, RunError, need
from unilora_ext.cli.files import sha256
from unilora_ext.cli.hub import write_data
from unilora_ext.cli.recipe import HubData, find
from unilora_ext.cli.settings import CAUSAL_LM, REGRESSION, Settings, option_name, read_run, run_record
from unilora_ext.files import replace_file

__all__ = ["command", "nothing_left", "run"]

WRITTEN = ("adapter", "checkpoints", "report", "validation.csv", "validation.jsonl", "run.json")
"""What a run writes into its folder; ``--overwrite`` deletes these and nothing else."""


def command(arguments: Namespace) -> None:
    """``unilora finetune`` with parsed arguments."""
    given = dict(vars(arguments))
    resume, overwrite = given.pop("resume", None), given.pop("overwrite", False)
    distributed.join(given.get("device", "auto") if resume is None else _device_of_run(Path(resume)))
    with distributed.together():
        if resume is not None:
            if overwrite or given:
                names = ", ".join(option_name(name) for name in [*given, *(["overwrite"] if overwrite else [])])
                raise CliError(f"--resume {resume}: expected no other setting, the run keeps its own; got {names}")
            settings, facts = read_run(Path(resume))
        else:
            recipe = find(given["recipe"]) if "recipe" in given else None
            if recipe is not None:
                given = {**recipe.settings, "data": recipe.data.hub, **given}
            for name, what in (("model", "a model folder or hub name"), ("data", "a file")):
                if name not in given:
                    raise CliError(
                        f"{option_name(name)}: expected {what}, got nothing (to go on with a run: --resume FOLDER)"
                    )
            settings, facts = Settings(**given), None
    if resume is None and recipe is not None and not Path(settings.data).is_file():
        settings = _with_data(settings, recipe.data, overwrite)
    run(settings, facts, overwrite)


def _with_data(settings: Settings, data: HubData, overwrite: bool) -> Settings:
    """With the files of a recipe's data set, beside the run's folder: a run that is resumed must find them again."""
    paths: dict[str, str] = {}
    with distributed.together():
        if distributed.is_first():
            check_output(Path(settings.output), overwrite, [])
            source = None if settings.data == data.hub and not Path(data.hub).is_dir() else settings.data
            if source is not None and not Path(source).is_dir():
                raise CliError(
                    f"--data {source}: expected a file of rows, or a folder with a copy of {data.hub}, got neither"
                )
            columns = [settings.text_column, settings.text_pair_column, settings.label_column]
            paths = write_data(data, source, [*filter(None, columns)], Path(f"{settings.output}-data"))
    paths = distributed.from_first(paths)
    given = {name: getattr(settings, name) for name in ("validation", "test")}
    return replace(settings, **{**paths, **{name: path for name, path in given.items() if path is not None}})


def _device_of_run(output: Path) -> str:
    """The device that a run asked for, as far as it can be read; what is wrong with the run is told later."""
    try:
        return json.loads((output / "run.json").read_text(encoding="utf-8"))["settings"]["device"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "auto"


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
    with distributed.together():
        if resumed is None and distributed.is_first():
            check_output(output, overwrite, [settings.data, settings.validation, settings.test])
        read = read_data(settings)
        settings = settings.absolute()
        facts = {"files": {path: sha256(path) for path in (settings.data, settings.validation, settings.test) if path}}
        if resumed is not None and resumed.get("files") != facts["files"]:
            changed = [path for path, digest in facts["files"].items() if resumed.get("files", {}).get(path) != digest]
            raise CliError(
                f"--resume {output}: expected the data the run began with, got changed files: {', '.join(changed)}"
            )
    finished = output / "report" / "metrics.json"
    if distributed.from_first(resumed is not None and finished.is_file()):
        print(f"{output}: this run is complete already; see {finished}")
        return json.loads(finished.read_text(encoding="utf-8")) if distributed.is_first() else {}

    from unilora_ext.cli.training import prepare, train  # PyTorch and Transformers, once all else is known to be good

    with ExitStack() as held:
        with distributed.together():
            task, rows = prepare(settings, read)
            facts["base_sha256"] = task.base_sha256
            begun_with = task.base_sha256 if resumed is None else str(resumed.get("base_sha256"))
            if begun_with != task.base_sha256:
                raise CliError(
                    f"--resume {output}: expected the frozen weights the run began with, got others in "
                    f"{settings.model} (SHA-256 {task.base_sha256[:16]}..., not {begun_with[:16]}...)"
                )
        try:
            with distributed.together():
                if distributed.is_first():
                    missing = [path for path in (output, *output.absolute().parents) if not path.exists()]
                    held.enter_context(_alone(output, create=resumed is None))
                    if resumed is None:
                        held.enter_context(nothing_left(output, missing, WRITTEN))
                    _begin(settings, facts, read, output, fresh=resumed is None)
            return train(settings, task, rows, output, time.perf_counter())
        except KeyboardInterrupt:
            print(f"\nInterrupted. Go on with: unilora finetune --resume {shlex.quote(settings.output)}")
            raise
        except OSError as error:
            raise RunError(f"{output}: the run ended early: {error}") from error


@contextmanager
def nothing_left(output: Path, missing: Sequence[Path], names: Sequence[str]) -> Iterator[None]:
    """Removes what was begun, where an error ends a run before its first checkpoint: nothing could go on from there.

    Args:
        output: folder of the run.
        missing: folders that were not there before, innermost first.
        names: what is the run's own in `output`.
    """
    try:
        yield
    except Exception:
        if checkpoints.latest(output / "checkpoints") is None:
            with suppress(OSError):  # a folder with more in it
                _remove(output, names)
                for folder in missing:
                    folder.rmdir()
        raise


def _remove(output: Path, names: Sequence[str]) -> None:
    for name in names:
        path = output / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _begin(settings: Settings, facts: dict[str, Any], rows: RunData, output: Path, fresh: bool) -> None:
    """What is in the run's folder before the training: nothing of an earlier run."""
    if fresh:
        _remove(output, WRITTEN)
        replace_file(output / "run.json", run_record(settings, facts))
    path = output / settings.validation_file
    if settings.task == CAUSAL_LM:
        write_conversations(path, rows.validation, settings.text_column)
    else:
        columns = (settings.text_column, settings.label_column, settings.text_pair_column)
        write_rows(path, rows.validation, *columns)
    for path in checkpoints.remove_incomplete(output / "checkpoints"):
        print(f"removed {path}: its saving was interrupted")


def read_data(settings: Settings) -> RunData:
    """All rows, split and checked."""
    if settings.task == CAUSAL_LM:
        return _read_conversations(settings)
    columns = (settings.text_column, settings.label_column)
    options = {"form": settings.form, "pair_column": settings.text_pair_column}
    options["numbers"] = numbers = settings.task == REGRESSION
    training = read_rows(settings.data, *columns, **options)
    labels = [] if numbers else label_names(training, f"{settings.data}, column '{settings.label_column}'")
    if settings.validation is not None:
        validation = read_rows(settings.validation, *columns, labels, **options)
    else:
        training, validation = split_rows(training, settings.validation_fraction, settings.seed, by_label=not numbers)
    test = read_rows(settings.test, *columns, labels, **options) if settings.test is not None else []
    return RunData(labels, training, validation, test)


def _read_conversations(settings: Settings) -> RunData:
    read = partial(read_conversations, text_column=settings.text_column, form=settings.form)
    training = read(settings.data)
    if settings.validation is not None:
        validation = read(settings.validation)
    else:
        training, validation = split_conversations(training, settings.validation_fraction, settings.seed)
    test = read(settings.test) if settings.test is not None else []
    return RunData([], training, validation, test)


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
