"""``unilora info``: versions, what was built, devices."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from argparse import Namespace
from typing import Any

import torch

from unilora_ext._native import _C, cuda_library
from unilora_ext.cli.files import as_json

__all__ = ["command", "facts"]

_OPTIONAL = ("transformers", "accelerate", "peft", "safetensors", "numpy", "scikit-learn", "matplotlib")


def facts() -> dict[str, dict[str, Any]]:
    """Everything that a report about a problem should say."""
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": {
            "unilora_ext": _C.version,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: _version(name) for name in _OPTIONAL},
        },
        "build": {
            "torch headers": _C.build_torch,
            "compiler": _C.build_compiler,
            "CUDA": _C.build_cuda or "none: built for the CPU only",
            "CUDA architectures": _C.build_cuda_architectures or "none",
            "CPU library": str(_C.__file__),
            "CUDA library": _cuda_library(),
        },
        "devices": {
            "platform": platform.platform(),
            "CPU threads": torch.get_num_threads(),
            "torch's CUDA": torch.version.cuda or "none: a CPU build of torch",
            **{f"cuda:{i}": _gpu(properties) for i, properties in enumerate(gpus)},
            **({} if gpus else {"GPU": "none"}),
        },
    }


def _gpu(properties: Any) -> str:
    capability = f"{properties.major}.{properties.minor}"
    return f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB, compute capability {capability}"


def _cuda_library() -> str:
    if cuda_library is not None:
        return f"loaded, {cuda_library}"
    return "not loaded: torch has no CUDA" if torch.version.cuda is None else "not loaded: it was not built"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def command(arguments: Namespace) -> None:
    """Prints :func:`facts`."""
    found = facts()
    if arguments.as_json:
        print(as_json(found), end="")
        return
    width = max(len(name) for part in found.values() for name in part)
    for title, part in found.items():
        print(title)
        for name, value in part.items():
            print(f"  {name:<{width}}  {value}")
