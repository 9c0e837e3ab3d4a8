"""The settings of a finetune run: one table for the parser, the checks and ``run.json``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from unilora_ext.cli.errors import CliError

__all__ = ["Settings", "option_name", "read_run", "run_record"]

FORMAT_VERSION = 1


def _option(
    default: Any, kind: type, text: str, expected: str = "", good: Callable[[Any], bool] = lambda _: True
) -> Any:
    """One setting: its default, type, help text, and the condition a value must meet with its wording."""
    return field(default=default, metadata={"kind": kind, "help": text, "expected": expected, "good": good})


def _one_of(*values: str) -> dict[str, Any]:
    return {"expected": "one of " + ", ".join(values), "good": values.__contains__}


def _positive(kind: str = "a number") -> dict[str, Any]:
    return {"expected": f"{kind} > 0", "good": lambda v: 0 < v < float("inf")}


_COUNT = {"expected": "an integer >= 1", "good": lambda v: v >= 1}
_FRACTION = {"expected": "a number in [0, 1)", "good": lambda v: 0 <= v < 1}


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result of ``unilora finetune``. The help texts below are its documentation."""

    model: str = _option("", str, "folder or hub name of the base model", "a folder or hub name", bool)
    data: str = _option("", str, "training rows: a .csv or .jsonl file with a text and a label column", "a file", bool)
    output: str = _option("unilora-run", str, "folder of the run", "a folder name", bool)
    validation: str | None = _option(None, str, "validation rows (without it, a part of --data)")
    test: str | None = _option(None, str, "test rows, scored once at the end with the best adapter")
    text_column: str = _option("text", str, "name of the text column", "a name", bool)
    label_column: str = _option("label", str, "name of the label column", "a name", bool)
    validation_fraction: float = _option(
        0.1, float, "share of --data held out for validation", "a number in (0, 1)", lambda v: 0 < v < 1
    )
    seed: int = _option(
        0, int, "seed of the split, the projection, the start values and the order", "an integer in [0, 2^32)",
        lambda v: 0 <= v < 2**32,
    )  # fmt: skip
    epochs: int = _option(3, int, "passes over the training rows", **_COUNT)
    batch_size: int = _option(16, int, "rows a step", **_COUNT)
    max_length: int | None = _option(
        None,
        int,
        "tokens kept of a text (without it, 128 or the model's limit)",
        "an integer >= 4",
        lambda v: v >= 4,
    )
    lr_theta: float = _option(0.02, float, "peak learning rate of theta_d", **_positive())
    lr_head: float = _option(0.002, float, "peak learning rate of the classifier head", **_positive())
    weight_decay: float = _option(
        0.0,
        float,
        "weight decay of theta_d and of the head's matrices",
        "a number >= 0",
        lambda v: 0 <= v < float("inf"),
    )
    warmup: float = _option(0.06, float, "share of the steps in which the learning rates rise", **_FRACTION)
    schedule: str = _option(
        "linear", str, "decay after the warm-up: linear, cosine or constant", **_one_of("linear", "cosine", "constant")
    )
    r: int = _option(4, int, "rank of every LoRA matrix pair", **_COUNT)
    d: int | None = _option(
        None, int, "length of theta_d (without it, an 18th of the LoRA values, a 9th in a small model)", **_COUNT
    )
    target_modules: tuple[str, ...] | None = _option(
        None, str, "layers to adapt: names or name endings, or all-linear (without it, query and value)", "names", bool
    )
    projection: str = _option("uniform", str, "uniform (the paper's) or balanced", **_one_of("uniform", "balanced"))
    alpha: float | None = _option(None, float, "the update is scaled by alpha / r (without it, by 1)", **_positive())
    dropout: float = _option(0.0, float, "dropout of the LoRA path's input", **_FRACTION)
    best: str = _option(
        "loss",
        str,
        "validation figure that tells the best epoch: loss or accuracy",
        **_one_of("loss", "accuracy"),
    )
    save_steps: int = _option(100, int, "steps between checkpoints, beside one after each epoch", **_COUNT)
    device: str = _option("auto", str, "auto, cpu or cuda", **_one_of("auto", "cpu", "cuda"))

    def __post_init__(self) -> None:
        for spec in fields(self):
            value, meta = getattr(self, spec.name), spec.metadata
            if value is None and spec.default is None:
                continue
            if not meta["good"](value):
                got = repr(value) if value != "" else "nothing"
                raise CliError(f"{option_name(spec.name)}: expected {meta['expected']}, got {got}")

    def absolute(self) -> Settings:
        """With absolute paths, so that the run can be resumed from anywhere."""
        paths = {name: getattr(self, name) for name in ("data", "validation", "test")}
        if os.path.isdir(self.model):
            paths["model"] = self.model
        return replace(self, **{name: os.path.abspath(path) for name, path in paths.items() if path})

    def deterministic(self) -> dict[str, Any]:
        """The settings that decide the numbers: not where they are written, nor how often they are saved."""
        return {key: value for key, value in asdict(self).items() if key not in ("output", "save_steps")}


def option_name(name: str) -> str:
    """``lr_theta`` -> ``--lr-theta``."""
    return "--" + name.replace("_", "-")


def run_record(settings: Settings, facts: Mapping[str, Any]) -> bytes:
    """``run.json``: the settings and facts that a resumed run must find unchanged (the files' SHA-256)."""
    return (
        json.dumps({"format_version": FORMAT_VERSION, "settings": asdict(settings), **facts}, indent=2).encode() + b"\n"
    )


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
        if values["target_modules"] is not None:
            values["target_modules"] = tuple(values["target_modules"])
        return Settings(**{**values, "output": str(output)}), record
    except CliError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CliError(f"{path}: expected the settings of a run as JSON; the file is damaged ({error})") from error
