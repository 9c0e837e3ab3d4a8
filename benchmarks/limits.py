"""The projection's limits, measured: the random accesses to its table and nothing else (limits.cpp)."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

READS, UPDATES = "reads of the table alone", "updates of the table alone"

HERE = Path(__file__).resolve().parent


def build(source: str, output: Path, *flags: str) -> None:
    """Compiles a program of this folder against the kernels' headers."""
    includes = ["-I", HERE.parent / "csrc", "-I", Path(torch.__file__).parent / "include"]
    command = ["g++", "-std=c++17", "-O3", "-fopenmp-simd", *flags, *includes, HERE / source, "-o", output]
    subprocess.run(command, check=True)


@cache
def _library() -> ctypes.CDLL | None:
    """Built for this run; None without a compiler."""
    if shutil.which("g++") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "limits.so"
        build("limits.cpp", library, "-shared", "-fPIC")
        return ctypes.CDLL(str(library))


def calls(index: torch.Tensor, d: int) -> dict[str, Callable[[], None]]:
    """The accesses of a forward and of a backward on one thread, by name; none without a compiler.

    Args:
        index: int32 [D] on the CPU.
        d: numbers of the table.
    """
    library = _library()
    if library is None:
        return {}
    table = torch.zeros(d)

    def call(function: str) -> Callable[[], None]:
        return lambda: getattr(library, function)(
            ctypes.c_void_p(table.data_ptr()), ctypes.c_void_p(index.data_ptr()), ctypes.c_int64(len(index))
        )

    return {READS: call("read_table"), UPDATES: call("update_table")}
