"""Loads the native libraries: ``_C`` (build facts, operator schemas, CPU kernels) and ``_C_cuda``."""

from __future__ import annotations

from pathlib import Path

import torch

__all__ = ["_C", "__version__", "cuda_library"]

try:
    from unilora_ext import _C  # torch comes first: it loads the libtorch that _C needs
except ImportError as error:
    raise ImportError(
        f"unilora_ext: the native library cannot be loaded from {Path(__file__).parent} ({error}). If this is a source "
        "folder, build it with 'pip install -e .', or start Python elsewhere to use the installed package; "
        "else install again with 'pip install .'"
    ) from error

__version__: str = _C.version


def _load_cuda_library() -> Path | None:
    path = Path(__file__).parent / "_C_cuda.so"
    if torch.version.cuda is None or not path.is_file():
        return None
    torch.ops.load_library(path)
    return path


cuda_library: Path | None = _load_cuda_library()
"""The CUDA library in use; None where PyTorch has no CUDA or the package was built without nvcc."""
