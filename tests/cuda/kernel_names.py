"""What a CUDA kernel is called: the mangled name of ptxas and cuobjdump, the emulator's, which is that of the launch,
and its own in the sources. :class:`Kernel` is what they have in common.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parents[2] / "csrc"
TYPES = {"__nv_bfloat16": "bfloat16", "__half": "half", "float": "float", "double": "double", "int": "int"}


@dataclass(frozen=True, order=True)
class Kernel:
    """A kernel as every tool names it.

    Attributes:
        name: of the __global__ function, without namespace.
        types: dtypes that it reads and writes, in the order of its arguments, each once.
        arguments: of the template, those of nested templates too; of a launch, the constants that are known there.
    """

    name: str
    types: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()

    def __str__(self) -> str:
        template = f" <{', '.join(self.arguments)}>" if self.arguments else ""
        return " ".join((self.name, *self.types)) + template

    @staticmethod
    def parse(text: str) -> Kernel:
        """From ``void space::name<16, float>(float const*, long)``; from ``name<kRanks>(float const*, long) [16]``, a
        launch, with constants of the place where it stands."""
        text, _, constants = text.partition(") [")
        text = text.rstrip(")") if not constants else text
        opening = _opening(text + ")", "(", ")")
        head, arguments = text[:opening].strip(), _split(text[opening + 1 :])
        template = ""
        if head.endswith(">"):
            angle = _opening(head, "<", ">")
            head, template = head[:angle], head[angle + 1 : -1]
        if not text.startswith("void "):  # a launch, whose template's words are those of the source
            template = constants.partition("]")[0]
        pointers = [argument for argument in arguments if "*" in argument or "<" in argument]
        types = dict.fromkeys(word for argument in pointers for word in _words(argument) if word in TYPES.values())
        return Kernel(head.rpartition("::")[2].split()[-1], tuple(types), tuple(_words(template)))


def _opening(text: str, opener: str, closer: str) -> int:
    """Where the bracket stands that the last character closes."""
    depth = 0
    for at in range(len(text) - 1, -1, -1):
        depth += (text[at] == closer) - (text[at] == opener)
        if depth == 0:
            return at
    raise ValueError(f"no {opener} for the last {closer} of {text}")


def _split(text: str) -> list[str]:
    """At the commas that are in no bracket."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "<([{") - (letter in ">)]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def _words(text: str) -> list[str]:
    """Types, names without namespaces, and constants without their types."""
    for old, new in (("(bool)0", "false"), ("(bool)1", "true")):
        text = text.replace(old, new)
    for mark in "<>,*&":
        text = text.replace(mark, " ")
    words = [word.rpartition(")")[2].rpartition("::")[2] for word in text.split()]
    return [TYPES.get(word, word) for word in words if word and word != "const"]


def demangle(names: Sequence[str]) -> dict[str, str]:
    """With c++filt, which comes with every C++ compiler."""
    done = subprocess.run(["c++filt"], input="\n".join(names), stdout=subprocess.PIPE, text=True, check=True)
    return dict(zip(names, done.stdout.splitlines(), strict=True))


@dataclass(frozen=True)
class Source:
    """Where a __global__ function stands: a file, and its first and last line."""

    path: Path
    first: int
    last: int


def kernels_of_sources(folder: Path = CSRC) -> dict[str, Source]:
    """The __global__ functions, by name."""
    found = {}
    for path in sorted((*folder.rglob("*.cuh"), *folder.rglob("*.cu"))):
        text = "\n".join(line.partition("//")[0] for line in path.read_text().splitlines())
        at = text.find("__global__")
        while at >= 0:
            name = at + len("__global__")
            bounds = text.find("__launch_bounds__", name)
            if 0 <= bounds < text.find("{", name):
                name = _closing(text, bounds, "(", ")") + 1
            end = _closing(text, name, "{", "}")
            declared = text[name : text.index("(", name)].split()[-1]
            found[declared] = Source(path, text.count("\n", 0, at) + 1, text.count("\n", 0, end) + 1)
            at = text.find("__global__", end)
    return found


def _closing(text: str, start: int, opener: str, closer: str) -> int:
    """Where the first bracket after `start` is closed."""
    depth = 0
    for at in range(text.index(opener, start), len(text)):
        depth += (text[at] == opener) - (text[at] == closer)
        if depth == 0:
            return at
    raise ValueError(f"no {closer} after {text[start : start + 80]}")
