"""The settings of a finetune run: one table for the parser, the checks and ``run.json``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from unilora_ext.cli.errors import CliError
from unilora_ext.cli.files import TextFormat, as_json, encoded
from unilora_ext.family import FAMILY

__all__ = [
    "CAUSAL_LM",
    "CLASSIFICATION",
    "ENCODERS",
    "ENCODING_HELP",
    "IMAGES",
    "REGRESSION",
    "SEPARATOR_HELP",
    "Settings",
    "check_task",
    "option_name",
    "read_run",
    "run_record",
]

FORMAT_VERSION = 1
ENCODING_HELP = "text encoding of the data files, such as cp1252, latin-1 or utf-16"
SEPARATOR_HELP = (
    "what separates the fields in .csv and .tsv files: a character, or tab (without it, a comma, and a tab in .tsv)"
)
CLASSIFICATION, REGRESSION, CAUSAL_LM = "sequence-classification", "sequence-regression", "causal-lm"
IMAGES = "image-classification"
ENCODERS = (CLASSIFICATION, REGRESSION, IMAGES)
"""The tasks of an encoder with a head: rows of a text, or two, or of an image, and a label."""
FIGURES = {
    CLASSIFICATION: ("accuracy", "matthews"),
    REGRESSION: ("pearson",),
    IMAGES: ("accuracy", "matthews"),
    CAUSAL_LM: (),
}
"""What ``--best`` takes for each task, beside the loss."""


def _option(
    default: Any,
    kind: Callable[[str], Any],
    text: str,
    expected: str = "",
    good: Callable[[Any], bool] = lambda _: True,
    tasks: tuple[str, ...] | None = None,
) -> Any:
    """One setting: its default, type, help text, the condition a value must meet with its wording, and the only tasks
    that have it."""
    metadata = {"kind": kind, "help": text, "expected": expected, "good": good, "tasks": tasks}
    return field(default=default, metadata=metadata)


def _one_of(*values: str) -> dict[str, Any]:
    return {"expected": "one of " + ", ".join(values), "good": values.__contains__}


def _positive(kind: str = "a number") -> dict[str, Any]:
    return {"expected": f"{kind} > 0", "good": lambda v: 0 < v < float("inf")}


# AdamW divides it by 1 - beta1 before it becomes a float32.
_RATE = {"expected": "a number in (0, 1e30]", "good": lambda v: 0 < v <= 1e30}
_COUNT = {"expected": "an integer >= 1", "good": lambda v: v >= 1}
_NOT_NEGATIVE = {"expected": "a number >= 0", "good": lambda v: 0 <= v < float("inf")}
_FRACTION = {"expected": "a number in [0, 1)", "good": lambda v: 0 <= v < 1}


def _length(text: str) -> int | str:
    return text if text == "auto" else int(text)


_length.__name__ = "length"  # in argparse's messages


def _are_options(values: tuple[str, ...]) -> bool:
    return all(name.isidentifier() and found for name, found, _ in (value.partition("=") for value in values))


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result of ``unilora finetune``. The help texts below are its documentation."""

    model: str = _option("", str, "base model: a folder or hub name; for causal-lm also a .gguf file", "a name", bool)
    data: str = _option(
        "",
        str,
        "training rows. To classify: .csv, .tsv or .jsonl with a text and a label column. For causal-lm: .jsonl with "
        "text, with prompt and completion (which is learnt), or with messages (the assistant's turns are learnt by the "
        "chat template); .csv or .tsv with a text column; .txt with one text a line",
        "a file",
        bool,
    )
    task: str = _option(
        CLASSIFICATION, str, f"{CLASSIFICATION}, {REGRESSION}, {IMAGES} or {CAUSAL_LM}", **_one_of(*FIGURES)
    )
    recipe: str | None = _option(
        None, str, "a published experiment, whose settings are the defaults then: 'unilora recipes' lists them"
    )
    output: str = _option("unilora-run", str, "folder of the run", "a folder name", bool)
    validation: str | None = _option(None, str, "validation rows (without it, a part of --data)")
    test: str | None = _option(None, str, "test rows, scored once at the end with the best adapter")
    text_column: str = _option(
        "text", str, "name of the text column; to classify images, of their files' names", "a name", bool
    )
    text_pair_column: str | None = _option(
        None,
        str,
        "name of a second text's column, where a row is a pair of sentences",
        "a name",
        bool,
        (CLASSIFICATION, REGRESSION),
    )
    label_column: str = _option(
        "label", str, "name of the label column: classes, or numbers to regress on", "a name", bool, ENCODERS
    )
    encoding: str = _option("utf-8", str, ENCODING_HELP, "a name", bool)
    separator: str | None = _option(None, str, SEPARATOR_HELP)
    validation_fraction: float = _option(
        0.1, float, "share of --data held out for validation", "a number in (0, 1)", lambda v: 0 < v < 1
    )
    seed: int = _option(
        0, int, "seed of the split, the projection, the start values and the rows' order", "an integer in [0, 2^32)",
        lambda v: 0 <= v < 2**32,
    )  # fmt: skip
    epochs: int = _option(3, int, "passes over the training rows; few rows need more of them: a run warns", **_COUNT)
    batch_size: int = _option(16, int, "rows in a step of the optimizer, of all processes together", **_COUNT)
    gradient_accumulation: int = _option(
        1, int, "parts in which a process works through its rows of a step: less memory, the same step", **_COUNT
    )
    max_length: int | None = _option(
        None,
        int,
        "tokens kept of a row (without it, 128, for causal-lm 512, or the model's limit where that is less)",
        "an integer >= 4",
        lambda v: v >= 4,
    )
    lr_theta: float | None = _option(
        None,
        float,
        "peak learning rate of theta_d (without it, 2 / width sqrt(D / d), or the projection's own); the trained parts "
        "of a projection keep their ratio to it",
        **_RATE,
    )
    lr_head: float = _option(0.002, float, "peak learning rate of the head", **_RATE, tasks=ENCODERS)
    weight_decay: float = _option(
        0.0,
        float,
        "weight decay of theta_d and of the head's matrices",
        **_NOT_NEGATIVE,
    )
    weight_decay_head: float | None = _option(
        None, float, "weight decay of the head's matrices (without it, --weight-decay)", **_NOT_NEGATIVE, tasks=ENCODERS
    )
    max_grad_norm: float = _option(
        1.0, float, "longest gradient of a step, which is shortened to it; 0: any", **_NOT_NEGATIVE
    )
    warmup: float = _option(0.06, float, "share of the steps in which the learning rates rise from 0", **_FRACTION)
    schedule: str = _option(
        "linear", str, "decay after the warm-up: linear, cosine or constant", **_one_of("linear", "cosine", "constant")
    )
    r: int = _option(4, int, "rank of every LoRA matrix pair", **_COUNT)
    d: int | str | None = _option(
        None,
        _length,
        "length of theta_d, the trained vector (without it, an 18th of the LoRA values, but at least 4,096); auto "
        "begins with up to 64 times less, and grows fourfold after an epoch that did not improve on the best",
        "an integer >= 1, or auto",
        lambda v: v == "auto" or (isinstance(v, int) and v >= 1),
    )
    target_modules: tuple[str, ...] | None = _option(
        None,
        str,
        "layers to adapt: names or name endings, or all-linear (without it, query and value; for causal-lm all-linear)",
        "names",
        bool,
    )
    projection: str = _option(
        "uniform",
        str,
        "how theta_d becomes the layers' updates: " + ", ".join(FAMILY),
        **_one_of(*FAMILY),
    )
    projection_option: tuple[str, ...] | None = _option(
        None, str, "settings of the projection, such as normalize=false", "NAME=VALUE", _are_options
    )
    alpha: float | None = _option(None, float, "the update is scaled by alpha / r (without it, by 1)", **_positive())
    dropout: float = _option(0.0, float, "dropout of the LoRA path's input", **_FRACTION)
    best: str = _option(
        "loss",
        str,
        "validation figure that tells the best epoch: loss, and to classify accuracy or matthews (the correlation), to "
        "regress pearson",
        **_one_of("loss", "accuracy", "matthews", "pearson"),
    )
    dtype: str = _option(
        "float32",
        str,
        "number format of the frozen weights: float32 or bfloat16",
        **_one_of("float32", "bfloat16"),
        tasks=(CAUSAL_LM,),
    )
    quantization: str = _option(
        "none",
        str,
        "of the frozen linear layers: none, or nf4 (4 bits, their scales too; needs bitsandbytes)",
        **_one_of("none", "nf4"),
        tasks=(CAUSAL_LM,),
    )
    gradient_checkpointing: bool = _option(
        False, bool, "recompute activations in the backward pass: less memory, more time, the same step"
    )
    save_steps: int = _option(100, int, "steps between checkpoints, beside one after each epoch", **_COUNT)
    device: str = _option(
        "auto", str, "auto, cpu or cuda; auto is cuda where there is a GPU", **_one_of("auto", "cpu", "cuda")
    )

    def __post_init__(self) -> None:
        for spec in fields(self):
            value, meta = getattr(self, spec.name), spec.metadata
            if value is None and spec.default is None:
                continue
            if not meta["good"](value):
                got = repr(value) if value != "" else "nothing"
                raise CliError(f"{option_name(spec.name)}: expected {meta['expected']}, got {got}")
            if self.task not in (meta["tasks"] or (self.task,)) and value != spec.default:
                tasks = " or ".join(meta["tasks"])
                raise CliError(f"{option_name(spec.name)}: expected with --task {tasks} only, got {self.task}")
        figures = ("loss", *FIGURES[self.task])
        if self.best not in figures:
            raise CliError(f"--best: expected {' or '.join(figures)} with --task {self.task}, got {self.best}")
        columns = [self.text_column, self.text_pair_column, self.label_column]
        if self.task in ENCODERS and len(set(columns)) < 3:
            raise CliError(
                f"--text-column, --text-pair-column, --label-column: expected different names, got {columns}"
            )
        _ = self.form  # which checks itself

    def absolute(self) -> Settings:
        """With absolute paths, so that the run can be resumed from anywhere."""
        paths = {name: getattr(self, name) for name in ("data", "validation", "test")}
        if os.path.exists(self.model):
            paths["model"] = self.model
        return replace(self, **{name: os.path.abspath(path) for name, path in paths.items() if path})

    @property
    def options(self) -> dict[str, Any]:
        """The projection's settings: numbers, true and false as JSON has them, and words."""
        options = {}
        for given in self.projection_option or ():
            name, _, value = given.partition("=")
            try:
                options[name] = json.loads(value)
            except ValueError:
                options[name] = value
        return options

    @property
    def form(self) -> TextFormat:
        """How the data files are written."""
        return TextFormat(self.encoding, self.separator)

    @property
    def validation_file(self) -> str:
        """Name of the validation rows in the run's folder."""
        return "validation.jsonl" if self.task == CAUSAL_LM else "validation.csv"

    def deterministic(self) -> dict[str, Any]:
        """The settings that decide the numbers: not where they are written, nor how often they are saved."""
        return {key: value for key, value in asdict(self).items() if key not in ("output", "save_steps")}


def check_task(adapter: Any, facts: Mapping[str, Any], task: str, other: str) -> None:
    """Refuses an adapter of the other task, which `other` serves."""
    if facts.get("task") not in (None, task):
        raise CliError(f"{adapter}: expected an adapter for {task}, got one for {facts['task']}; use {other}")


def option_name(name: str) -> str:
    """``lr_theta`` -> ``--lr-theta``."""
    return "--" + name.replace("_", "-")


def run_record(settings: Settings, facts: Mapping[str, Any]) -> bytes:
    """``run.json``: the settings and facts that a resumed run must find unchanged (the files' SHA-256)."""
    return encoded(as_json({"format_version": FORMAT_VERSION, "settings": asdict(settings), **facts}))


def read_run(output: Path) -> tuple[Settings, dict[str, Any]]:
    """Settings and facts of the run in `output`.

    Raises:
        CliError: there is none, or its ``run.json`` is damaged.
    """
    path = output / "run.json"
    if not path.is_file():
        what = "a folder without run.json" if output.is_dir() else "no such folder"
        raise CliError(f"--resume {output}: expected the folder of a run that 'unilora finetune' began, got {what}")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version, values = record.pop("format_version"), record.pop("settings")
        if version != FORMAT_VERSION:
            raise CliError(f"{path}: expected format version {FORMAT_VERSION}, got {version!r}")
        values.setdefault("projection_option", None)  # of version 0.1.0
        for name in ("target_modules", "projection_option"):
            if values[name] is not None:
                values[name] = tuple(values[name])
        return Settings(**{**values, "output": str(output)}), record
    except CliError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CliError(f"{path}: expected the settings of a run as JSON; the file is damaged ({error})") from error
