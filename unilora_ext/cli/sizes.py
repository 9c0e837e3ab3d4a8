"""Sizes of an adapter beside the same LoRA and the whole model."""

from __future__ import annotations

from pathlib import Path

import unilora_ext as ul
from unilora_ext.cli.model import TaskModel
from unilora_ext.layout import Order

__all__ = ["file_sizes", "model_sizes", "table"]


def file_sizes(file: ul.AdapterFile) -> dict[str, int]:
    """Numbers and bytes of a saved adapter. LoRA: the D values that it makes, 4 bytes each."""
    files = file.record["files"]
    return {
        "d": file.record["d"],
        "D": file.record["D"],
        "dense": file.record["layout"] == Order.DENSE.value,
        "part_numbers": sum(t.numel() for t in file.parts.values()),
        "theta_d_bytes": files["theta_d"]["bytes"],
        "lora_bytes": 4 * file.record["D"],
        "head_parameters": sum(t.numel() for t in file.modules_to_save.values()),
        "head_bytes": files["modules_to_save"]["bytes"] if "modules_to_save" in files else 0,
        "folder_bytes": sum(path.stat().st_size for path in file.folder.iterdir()),
    }


def model_sizes(task: TaskModel, folder: Path) -> dict[str, int]:
    """:func:`file_sizes` and those of the model: its own parameters, at their own width."""
    trained = {id(parameter) for parameter in task.adapter.trained.values()}
    parameters = [p for p in task.model.parameters() if id(p) not in trained]
    return {
        **file_sizes(ul.read(folder)),
        "model_parameters": sum(p.numel() for p in parameters),
        "model_bytes": sum(p.numel() * p.element_size() for p in parameters),
    }


def table(sizes: dict[str, int]) -> str:
    """The sizes as lines of text."""
    rows = [
        (
            "adapter: theta_d and parts" if sizes["part_numbers"] else "adapter: theta_d",
            sizes["d"] + sizes["part_numbers"],
            sizes["theta_d_bytes"],
        ),
        ("same updates, dense" if sizes["dense"] else "same matrices as LoRA", sizes["D"], sizes["lora_bytes"]),
    ]
    if sizes["head_parameters"]:
        rows.append(("classifier head (in each)", sizes["head_parameters"], sizes["head_bytes"]))
    if "model_bytes" in sizes:
        rows.append(("whole model", sizes["model_parameters"], sizes["model_bytes"]))
    lines = [f"  {'':<26}{'numbers':>14}{'bytes':>16}"]
    lines += [f"  {name:<26}{numbers:>14,}{size:>16,}" for name, numbers, size in rows]
    return "\n".join([*lines, f"  {'adapter folder in all':<26}{'':>14}{sizes['folder_bytes']:>16,}"])
