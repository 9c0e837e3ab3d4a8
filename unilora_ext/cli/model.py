"""The classifier: a Transformers encoder with a head, built anew or from a saved adapter."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import unilora_ext as ul
from unilora_ext.cli.errors import CliError
from unilora_ext.cli.settings import Settings
from unilora_ext.targets import find_targets

__all__ = [
    "TASK",
    "Classifier",
    "attach",
    "device_of",
    "load_classifier",
    "load_task_model",
    "metadata",
    "plain_model",
    "quiet_bars",
]

TASK = "sequence-classification"
EVALUATION_BATCH = 32
DEFAULT_MAX_LENGTH = 128
SMALL_D = 4096  # the paper's ratio D / d of about 18 leaves a small model too little; 16 KiB is no burden

# Query and value projections by their names in Transformers' models; the first pair that a model has is taken.
_QUERY_VALUE = (
    ("query", "value"),
    ("q_lin", "v_lin"),
    ("q_proj", "v_proj"),
    ("query_proj", "value_proj"),
    ("q", "v"),
    ("Wqkv",),
    ("query_key_value",),
    ("c_attn",),
)


@dataclass(frozen=True)
class Classifier:
    """A model with its tokenizer and what belongs to both.

    Attributes:
        model: adapted, on its device.
        tokenizer: of the base model.
        labels: names of the classes, by their number.
        max_length: tokens kept of a text.
        adapter: of `model`.
    """

    model: Any
    tokenizer: Any
    labels: tuple[str, ...]
    max_length: int
    adapter: ul.Adapter


def device_of(name: str) -> torch.device:
    """The device for ``auto``, ``cpu`` or ``cuda``.

    Raises:
        CliError: cuda where there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise CliError(
            f"--device: expected a device of this machine, got cuda; torch {torch.__version__} sees no GPU here"
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def plain_model(base: str, labels: Sequence[str], max_length: int | None) -> tuple[Any, Any, list[str], int]:
    """(model, tokenizer, modules to train whole, max_length) of a base model with a head for `labels`.

    Trained whole are the head (all outside ``base_model``) and whatever the base model's files have no weights for:
    those start at random, and only saving them makes the adapter complete.

    Raises:
        CliError: the model cannot be loaded or does not fit the task; the message says what is missing.
    """
    if os.path.isdir(base):
        if not os.path.isfile(os.path.join(base, "config.json")):
            raise CliError(f"--model {base}: expected a model folder with config.json, found none in it")
    elif Path(base).is_absolute() or base.startswith((".", "~")) or base.count("/") > 1:
        raise CliError(f"--model {base}: expected a model folder or a hub name, got a path that is no folder")
    with quiet_bars():
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(base)
            model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
                base,
                num_labels=len(labels),
                id2label=dict(enumerate(labels)),
                label2id={label: i for i, label in enumerate(labels)},
                problem_type="single_label_classification",
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except Exception as error:  # Transformers and safetensors raise of every kind for files that do not fit
            raise CliError(
                f"--model {base}: expected a Transformers encoder for sequence classification with its tokenizer; "
                f"loading it failed: {_first_line(error)}"
            ) from error
    if tokenizer.pad_token is None:
        raise CliError(f"--model {base}: expected a tokenizer with a padding token, got one without")
    limit = min(tokenizer.model_max_length, _positions(model))
    if max_length is None:
        max_length = min(DEFAULT_MAX_LENGTH, limit)
    elif max_length > limit:
        raise CliError(f"--max-length: expected at most {limit}, the longest input of {base}; got {max_length}")
    parts = [(name, part) for name, part in model.named_children() if part is not model.base_model]
    head = [name for name, part in parts if next(part.parameters(), None) is not None]
    new = {
        key if isinstance(key, str) else key[0] for kind in ("missing_keys", "mismatched_keys") for key in info[kind]
    }
    fresh = sorted({key.rpartition(".")[0] for key in new if key.partition(".")[0] not in head})
    return model, tokenizer, [*head, *(name for name in fresh if name)], max_length


def _positions(model: nn.Module) -> int:
    """How many tokens the model's position table serves; RoBERTa's has padding_idx + 1 rows of no use."""
    table = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    if isinstance(table, nn.Embedding):
        return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
    return getattr(model.config, "max_position_embeddings", None) or 10**9


def attach(base: str, labels: Sequence[str], config: dict[str, Any], max_length: int | None) -> Classifier:
    """A new classifier with a new adapter.

    Args:
        base: folder or hub name.
        labels: class names.
        config: of :class:`unilora_ext.UniLoRAConfig`; target_modules None: chosen by the model's names.
        max_length: tokens kept of a text; None: 128 or what the model takes.
    """
    model, tokenizer, whole, max_length = plain_model(base, labels, max_length)
    targets = config["target_modules"] or default_targets(model)
    targets = "all-linear" if list(targets) == ["all-linear"] else targets
    chosen = ul.UniLoRAConfig(**{**config, "target_modules": targets, "modules_to_save": whole})
    if chosen.d is None:
        D = sum((target.m + target.n) * chosen.r for target in find_targets(model, targets, whole))
        chosen = replace(chosen, d=max(ul.default_d(D), min(SMALL_D, D // 9)))
    return Classifier(model, tokenizer, tuple(labels), max_length, ul.attach(model, chosen))


def default_targets(model: nn.Module) -> tuple[str, ...]:
    """Query and value layers by the names the model's architecture gives them, else all linear layers."""
    endings = {name.rpartition(".")[2] for name, _ in model.base_model.named_modules()}
    return next((names for names in _QUERY_VALUE if endings.issuperset(names)), ("all-linear",))


def metadata(classifier: Classifier, settings: Settings) -> dict[str, Any]:
    """What an adapter file must say so that ``evaluate`` and ``predict`` need nothing else."""
    return {
        "task": TASK,
        "base_model": settings.model,
        "base_digest": base_digest(classifier.adapter),
        "labels": list(classifier.labels),
        "max_length": classifier.max_length,
        "batch_size": EVALUATION_BATCH,
        "text_column": settings.text_column,
        "label_column": settings.label_column,
    }


def base_digest(adapter: ul.Adapter) -> str:
    """A short digest of the base weights (the first row of every adapted one), to tell another base model."""
    digest = hashlib.sha256()
    for name, layer in adapter.layers.items():
        digest.update(name.encode() + layer.weight[0].detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def load_task_model(folder: str | Path, base: str | None = None) -> tuple[Classifier, ul.AdapterFile]:
    """The classifier that was saved in `folder`, on the CPU, and the file's content.

    Args:
        folder: of an adapter that ``unilora finetune`` wrote.
        base: folder or hub name of the base model, instead of the one the adapter names.

    Raises:
        CliError: not such an adapter, or another base model.
    """
    file = ul.read(folder)
    facts = file.metadata
    if facts.get("task") != TASK:
        raise CliError(
            f"{folder}: expected an adapter that 'unilora finetune' wrote (metadata task '{TASK}'), "
            f"got task {facts.get('task')!r}; load it in Python with unilora_ext.load"
        )
    name = base or facts["base_model"]
    if base is None and Path(name).is_absolute() and not os.path.isdir(name):
        raise CliError(f"{folder}: its base model {name}: expected a folder, found none; say where it is with --model")
    model, tokenizer, _, max_length = plain_model(name, facts["labels"], facts["max_length"])
    adapter = ul.load(model, folder)
    if base_digest(adapter) != facts["base_digest"]:
        raise CliError(
            f"--model {name}: expected the weights the adapter was trained on (digest {facts['base_digest']}), "
            f"got others (digest {base_digest(adapter)})"
        )
    return Classifier(model.eval(), tokenizer, tuple(facts["labels"]), max_length, adapter), file


def load_classifier(folder: str | Path, base: str | None, device: str) -> tuple[Classifier, ul.AdapterFile]:
    """:func:`load_task_model`, moved to a device."""
    target = device_of(device)
    classifier, file = load_task_model(folder, base)
    classifier.model.to(target)
    return classifier, file


def _first_line(error: BaseException) -> str:
    return " ".join([type(error).__name__ + ":", *str(error).strip().splitlines()[:1]])


@contextmanager
def quiet_bars() -> Iterator[None]:
    """No bars, and no table of new weights, while Transformers reads or writes a model."""
    log = transformers.utils.logging
    level, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bar:
            log.enable_progress_bar()
