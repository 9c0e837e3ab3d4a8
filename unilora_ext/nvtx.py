"""Named ranges for profilers.

In ``torch.profiler`` every operator shows under its own name with nothing to switch on: ``unilora::project``,
``unilora::project_scatter`` (its transpose; on CUDA ``unilora::project_segment_sum``), ``unilora::lora_linear``,
``unilora::lora_linear_backward``, ``unilora::lora_update_``. For Nsight Systems (nsys) there are NVTX ranges, of the
whole step from Python to the last kernel launch: ``unilora::project``, ``unilora::project_backward``,
``unilora::lora_linear``, ``unilora::lora_linear_backward``. They are off, and cost nothing, until :func:`enable` is
called or the environment has ``UNILORA_NVTX=1`` when the package is imported.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["enable", "enabled", "span"]

_OFF = nullcontext()
_enabled = os.environ.get("UNILORA_NVTX", "") not in ("", "0")


class _Range:
    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        torch.cuda.nvtx.range_push(self._name)

    def __exit__(self, *exc: object) -> None:
        torch.cuda.nvtx.range_pop()


def enable(on: bool = True) -> None:
    """Switches the NVTX ranges on or off; needs a PyTorch built with CUDA."""
    global _enabled
    _enabled = on


def enabled() -> bool:
    """Whether NVTX ranges are made."""
    return _enabled


def span(name: str) -> AbstractContextManager[None]:
    """A context manager: an NVTX range `name` where ranges are on, else nothing."""
    return _Range(name) if _enabled else _OFF
