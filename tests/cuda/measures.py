"""What can be known of a CUDA kernel without a GPU: what nvcc made of it, and the accesses that an emulator counts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from kernel_names import CSRC, Kernel, Source, demangle, kernels_of_sources

HERE = Path(__file__).resolve().parent
ARCHITECTURES = ("80", "90", "100", "120")


def command(*words: object) -> tuple[bool, str]:
    """Runs it; whether it succeeded, and what it printed."""
    done = subprocess.run([str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode == 0, done.stdout


def find_tool(name: str, variable: str) -> str | None:
    """The path in the environment's `variable`, or `name` in CUDA_HOME or on PATH."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return os.environ.get(variable) or shutil.which(name, path=f"{home}/bin") or shutil.which(name)


def nvcc(source: Path, *flags: object) -> tuple[bool, str]:
    found = find_tool("nvcc", "CUDACXX")
    if not found:
        sys.exit("tests/cuda/run: no nvcc in CUDACXX, in CUDA_HOME or on PATH")
    return command(found, "-std=c++17", "-O3", "-Werror", "all-warnings", "-I", CSRC, "-I", HERE, *flags, source)


def compile_all(
    source: Path, folder: Path, *flags: object, architectures: Sequence[str] = ARCHITECTURES
) -> tuple[bool, str]:
    """``folder/<stem>.o`` for these architectures; the text is that of ptxas -v."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    return nvcc(source, *targets, "-Xptxas", "-v", *flags, "-c", "-o", folder / f"{source.stem}.o")


# ---- nvcc ---------------------------------------------------------------------------------------------------------


@dataclass
class Code:
    """A kernel's machine code of one architecture, in the program of `stem`. Bytes of `shared` are the static ones.
    Bits of the widest load and store of global memory, numbers of tensor-core instructions and of asynchronous copies:
    None without cuobjdump."""

    stem: str
    kernel: Kernel
    architecture: str
    registers: int = 0
    shared: int = 0
    spills: int = 0
    load_bits: int | None = None
    store_bits: int | None = None
    mma: int | None = None
    copies: int | None = None


def read_ptxas(text: str) -> dict[tuple[str, str], dict[str, int]]:
    """registers, shared and spills of each (mangled name, architecture), from the output of ptxas -v."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    at: dict[str, int] = {}
    for line in text.splitlines():
        if "Compiling entry function '" in line:
            name, architecture = line.split("'")[1::2]
            at = found[name, architecture] = {"registers": 0, "shared": 0, "spills": 0}
            continue
        for part in line.partition("Used ")[2].split(",") if "Used " in line else line.split(","):
            number, _, what = part.strip().partition(" ")
            what = {"bytes smem": "shared", "bytes spill stores": "spills", "bytes spill loads": "spills"}.get(
                what, what
            )
            if number.isdigit() and what in at:
                at[what] += int(number)
    return found


def read_sass(text: str) -> dict[tuple[str, str], dict[str, int]]:
    """load_bits, store_bits, mma and copies of each (mangled name, architecture), from cuobjdump -sass."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    at: dict[str, int] = {}
    architecture = ""
    for line in text.splitlines():
        words = line.split()
        if words[:2] == ["code", "for"]:
            architecture = words[2]
        elif words[:2] == ["Function", ":"]:
            at = found[words[2], architecture] = {"load_bits": 0, "store_bits": 0, "mma": 0, "copies": 0}
        elif len(words) > 1 and words[0].startswith("/*"):
            opcode = words[2] if words[1].startswith("@") else words[1]
            first, *modifiers = opcode.rstrip(";").split(".")
            if first in ("LDG", "LD", "STG", "ST"):
                bits = "load_bits" if first.startswith("LD") else "store_bits"
                at[bits] = max(at[bits], _width(modifiers))
            at["mma"] += first.endswith(("HMMA", "DMMA"))
            at["copies"] += first == "LDGSTS"
    return found


def _width(modifiers: Iterable[str]) -> int:
    """Bits of a load or store: .128 or .U16, or 32 where nothing is said."""
    for modifier in modifiers:
        digits = modifier[1:] if modifier[:1] in ("U", "S") else modifier
        if digits.isdigit():
            return int(digits)
    return 32


def codes(source: Path, folder: Path, *flags: object) -> list[Code]:
    """Compiles a program for all architectures; the code of each kernel in it.

    Raises:
        RuntimeError: it does not compile.
    """
    good, text = compile_all(source, folder, *flags)
    if not good:
        raise RuntimeError(f"{source.name} does not compile:\n{text}")
    sass: Mapping[tuple[str, str], dict[str, int]] = {}
    disassembler = find_tool("cuobjdump", "CUOBJDUMP")
    if disassembler:
        done, listing = command(disassembler, "-sass", folder / f"{source.stem}.o")
        if not done:
            raise RuntimeError(f"cuobjdump -sass {source.stem}.o failed:\n{listing[-2000:]}")
        sass = read_sass(listing)
    resources = read_ptxas(text)
    names = demangle([name for name, _ in resources])
    return [
        Code(stem_of(source), Kernel.parse(names[name]), architecture, **values, **sass.get((name, architecture), {}))
        for (name, architecture), values in resources.items()
    ]


def stem_of(source: Path) -> str:
    """Of profile_<stem>.cu."""
    return source.stem.removeprefix("profile_")


# ---- the emulator -------------------------------------------------------------------------------------------------


@dataclass
class Launches:
    """What one kernel's launches by the program of `stem` did, each launch's record as the emulator gives it."""

    stem: str
    kernel: Kernel
    records: list[dict] = field(default_factory=list)

    def values(self, metric: str) -> list[float]:
        if metric == "bytes":
            return [record["unique_bytes_read"] + record["unique_bytes_written"] for record in self.records]
        return [record[metric] for record in self.records]

    @property
    def block(self) -> int:
        """Threads of a block, the largest."""
        return max(record["threads"] // record["blocks"] for record in self.records)


def launches(source: Path, folder: Path, emulator: Path, *flags: str) -> list[Launches]:
    """Runs a profile program on the emulator.

    Raises:
        RuntimeError: it does not run, or finds an error.
    """
    target = folder / f"{source.stem}.json"
    words = (emulator, "profile", source, "--launches", "--json", target, "--tmp", folder / source.stem)
    # "-IDIR" in one word: the emulator follows quoted includes through these folders
    good, text = command(sys.executable, *words, "--", f"-I{CSRC}", f"-I{HERE}", *flags)
    if not good:
        raise RuntimeError(f"{source.name} fails on the emulator:\n{text}")
    return read_profile(target, stem_of(source))


def read_profile(path: Path, stem: str = "") -> list[Launches]:
    """The launches in the JSON file of the emulator's ``profile --launches``."""
    found: dict[Kernel, Launches] = {}
    sources = kernels_of_sources()
    for record in json.loads(path.read_text())["kernels"]:
        if not record["lines"]:  # the program's own, which touches no memory
            continue
        kernel = Kernel.parse(record["kernel"].rpartition(" #")[0])
        if kernel.name not in sources:
            kernel = replace(kernel, name=_kernel_at(record["lines"], sources) or kernel.name)
        found.setdefault(kernel, Launches(stem, kernel)).records.append(record)
    return list(found.values())


def _kernel_at(lines: Iterable[Mapping], sources: Mapping[str, Source]) -> str | None:
    """Of a launch through a variable: the kernel in whose lines memory was accessed."""
    for line in lines:
        path, _, number = line["line"].rpartition(":")
        for name, source in sources.items():
            if source.path.name == path and source.first <= int(number) <= source.last:
                return name
    return None


# ---- occupancy ----------------------------------------------------------------------------------------------------

# Compute capability 9.0: CUDA C++ Programming Guide, technical specifications per compute capability, and the
# allocation units of the occupancy calculator.
REGISTERS = 64 * 1024  # of a multiprocessor
REGISTER_UNIT = 256  # allocated to a warp in these
WARPS = 64
BLOCKS = 32
SHARED = 228 * 1024
SHARED_RESERVED = 1024  # of each block, by the system
SHARED_UNIT = 128


def resident_blocks(block: int, registers: int, shared: int) -> int:
    """Blocks of `block` threads that an sm_90 multiprocessor holds at a time."""
    warps = -(-block // 32)
    of_warp = -(-max(registers, 1) * 32 // REGISTER_UNIT) * REGISTER_UNIT
    of_block = -(-(shared + SHARED_RESERVED) // SHARED_UNIT) * SHARED_UNIT
    return min(BLOCKS, WARPS // warps, REGISTERS // of_warp // warps, SHARED // of_block)


def occupancy(block: int, registers: int, shared: int) -> float:
    """Resident warps of an sm_90 multiprocessor over its 64."""
    return resident_blocks(block, registers, shared) * -(-block // 32) / WARPS
