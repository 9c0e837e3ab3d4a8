"""The tasks by name, and the model of a saved adapter."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import unilora_ext as ul
from unilora_ext.cli.base import base_digest
from unilora_ext.cli.classifier import Classifier
from unilora_ext.cli.decoder import Decoder
from unilora_ext.cli.errors import CliError
from unilora_ext.cli.images import ImageClassifier
from unilora_ext.cli.model import TaskModel, device_of
from unilora_ext.cli.regressor import Regressor

__all__ = ["TASKS", "load_on", "load_task_model"]

TASKS: dict[str, type[TaskModel]] = {kind.task: kind for kind in (Classifier, Regressor, ImageClassifier, Decoder)}


def load_task_model(folder: str | Path, base: str | None = None) -> tuple[TaskModel, ul.AdapterFile]:
    """The model that was saved in `folder`, on the CPU, and the file's content.

    Args:
        folder: of an adapter that ``unilora finetune`` wrote.
        base: the base model, instead of the one the adapter names.

    Raises:
        CliError: not such an adapter, or another base model.
    """
    file = ul.read(folder)
    facts = file.metadata
    if facts.get("task") not in TASKS:
        raise CliError(
            f"{folder}: expected an adapter that 'unilora finetune' wrote (metadata task {' or '.join(TASKS)}), "
            f"got task {facts.get('task')!r}; load it in Python with unilora_ext.load"
        )
    name, kind = base or facts["base_model"], TASKS[facts["task"]]
    if base is None and Path(name).is_absolute() and not os.path.exists(name):
        raise CliError(f"{folder}: its base model {name}: expected it there, found none; say where it is with --model")
    attributes = kind.restored(name, facts)
    model = attributes["model"]
    adapter = ul.load(model, folder)
    if base_digest(adapter) != facts["base_digest"]:
        raise CliError(
            f"--model {name}: expected the weights the adapter was trained on (digest {facts['base_digest']}), "
            f"got others (digest {base_digest(adapter)})"
        )
    model.eval()
    task = kind(adapter=adapter, **attributes)
    if facts.get("base_sha256", task.base_sha256) != task.base_sha256:
        print(
            f"unilora: warning: --model {name}: expected the frozen weights the adapter was trained on (SHA-256 "
            f"{facts['base_sha256'][:16]}...), got others ({task.base_sha256[:16]}...): its numbers will be others too",
            file=sys.stderr,
        )
    return task, file


def load_on(folder: str | Path, base: str | None, device: str) -> tuple[TaskModel, ul.AdapterFile]:
    """:func:`load_task_model`, moved to a device."""
    target = device_of(device)
    task, file = load_task_model(folder, base)
    task.model.to(target)
    return task, file
