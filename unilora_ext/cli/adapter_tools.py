"""``unilora inspect``, ``merge`` and ``export``: what can be done with a saved adapter."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors

from unilora_ext.checkpoint import AdapterFile, read
from unilora_ext.cli.errors import CliError, RunError, need
from unilora_ext.cli.files import as_json
from unilora_ext.cli.outputs import check_target, write

__all__ = ["export", "inspect", "merge"]

_NAMES = {
    "base_digest": "digest of the base",
    "base_sha256": "SHA-256 of the base",
    "max_length": "tokens of a row",
    "batch_size": "rows of a batch",
}
"""What ``inspect`` calls the facts that a run keeps with its adapter."""


def inspect(arguments: Namespace) -> None:
    """Prints what an adapter folder holds. No model is needed."""
    check_target(arguments.json, None)
    file = read(arguments.adapter)
    if arguments.json is not None:
        write(arguments.json, as_json(dict(file.record)))
    record, theta_d = file.record, file.theta_d.double()
    lines = {
        "adapter": str(arguments.adapter),
        "written by": f"unilora_ext {record['library_version']}, format version {record['format_version']}",
        "base model": record["base_model"] or "not recorded",
        "theta_d": f"d = {record['d']:,} numbers ({str(file.theta_d.dtype).removeprefix('torch.')}), "
        f"norm {theta_d.norm():.4g}, largest {theta_d.abs().max():.4g}",
        "values made": f"D = {record['D']:,} (D / d = {record['D'] / record['d']:.4g}), r = {record['r']}, "
        f"scaling {record['scaling']:g}",
        "projection": _projection(record["projection"]),
        **({"parts": ", ".join(f"{name} {list(t.shape)}" for name, t in file.parts.items())} if file.parts else {}),
        "modules": _modules(file),
        "trained whole": ", ".join(file.config.modules_to_save) or "none",
        "fingerprint": record["fingerprint"],
    }
    for kind, entry in record["files"].items():
        lines[f"file {kind}"] = f"{entry['bytes']:,} bytes, {entry['name']}"
    for key, value in file.metadata.items():
        lines[_NAMES.get(key, key.replace("_", " "))] = (
            value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        )
    width = max(map(len, lines))
    print("\n".join(f"{key:<{width}}  {value}" for key, value in lines.items()))


def _projection(spec: Mapping[str, Any]) -> str:
    options = {name.replace("_", " "): value for name, value in spec["options"].items()}
    shown = {**{key: value for key, value in spec.items() if key != "options"}, **options}
    return ", ".join(f"{key} {json.dumps(value) if key in options else value}" for key, value in shown.items())


def _modules(file: AdapterFile) -> str:
    kinds = Counter((name.rpartition(".")[2], m, n) for name, m, n in file.modules)
    return f"{len(file.modules)}: " + ", ".join(f"{name} [{m}, {n}] x {count}" for (name, m, n), count in kinds.items())


def merge(arguments: Namespace) -> None:
    """Writes the base model with the update folded in, and its tokenizer, as a Transformers model folder."""
    need("transformers")
    output = _new_folder(arguments.output)

    from unilora_ext.cli.model import quiet_bars
    from unilora_ext.cli.tasks import load_task_model

    task, _ = load_task_model(arguments.adapter, arguments.model)
    model = task.adapter.detach(merge=True)
    with _Folder(output) as folder, quiet_bars():
        model.save_pretrained(folder)
        task.tokenizer.save_pretrained(folder)
    print(
        f"wrote a {type(model).__name__} with its tokenizer to {output}; load it with\n"
        f"  transformers.{task.auto_class}.from_pretrained({str(output)!r})"
    )


def export(arguments: Namespace) -> None:
    """Writes the same update as plain LoRA matrices in PEFT's format."""
    need("transformers")
    output = _new_folder(arguments.output)

    from unilora_ext.cli.tasks import load_task_model

    task, file = load_task_model(arguments.adapter, arguments.model)
    with _Folder(output) as folder:
        task.adapter.export_lora(folder)
    size = sum(path.stat().st_size for path in output.iterdir())
    own = sum(entry["bytes"] for entry in file.record["files"].values())
    print(
        f"wrote a PEFT LoRA adapter of rank {file.config.r} to {output} ({size:,} bytes; the Uni-LoRA adapter: "
        f"{own:,}); load it with\n  peft.PeftModel.from_pretrained(model, {str(output)!r})"
    )


def _new_folder(path: str) -> Path:
    output = Path(path)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        got = "one with files in it" if output.is_dir() else "a file"
        raise CliError(f"--output {path}: expected a new or empty folder, got {got}")
    if not output.absolute().parent.is_dir():
        raise CliError(f"--output {path}: expected a name in an existing folder, got no folder {output.parent}")
    return output


class _Folder:
    """A folder written beside its place and renamed at the end, so that it is there whole or not at all."""

    def __init__(self, output: Path) -> None:
        self.output, self.temporary = output, output.absolute().with_name(f".{output.name}.tmp")

    def __enter__(self) -> Path:
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir()
        return self.temporary

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *rest: object) -> None:
        if kind is None:
            self.temporary.replace(self.output)
            return
        shutil.rmtree(self.temporary, ignore_errors=True)
        if isinstance(error, (OSError, safetensors.SafetensorError)):
            raise RunError(f"{self.output}: expected to write a folder there, got: {error}") from error
