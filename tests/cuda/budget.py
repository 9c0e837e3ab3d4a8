"""The file `budgets`: its lines, and what was measured held to them."""

from __future__ import annotations

import ast
import fnmatch
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from measures import Code, Launches

FILE = Path(__file__).resolve().parent / "budgets"

LAUNCH_METRICS: dict[str, str] = {
    "bytes": "bytes",
    "read": "unique_bytes_read",
    "written": "unique_bytes_written",
    "sectors": "sectors_over_ideal",
    "sectors_read": "sectors_read",
    "sectors_written": "sectors_written",
    "sectors_per_request": "sectors_per_request",
    "ways": "worst_line_ways",
    "mma_flop": "mma_flop",
}
"""Of a launch: the key of the emulator's record."""
CODE_METRICS = ("registers", "shared", "spills", "load_bits", "store_bits", "mma", "copies")
"""Of the code: a field of Code."""


class BudgetError(Exception):
    """A line of the file is not understood; the message begins with its place."""


@dataclass(frozen=True)
class Line:
    """``KERNEL | METRIC | LIMIT``, its limit worked out, about the kernels of profile_<stem>.cu."""

    number: int
    stem: str
    kernel: str
    metric: str
    limit: float
    at_least: bool = False

    def matches(self, measured: Launches | Code) -> bool:
        kernel = measured.kernel
        name, *words = (word for word in self.kernel.split() if not word.startswith("#"))
        types = [word for word in words if not _is_argument(word)]
        arguments = [word for word in words if _is_argument(word)]
        return (
            self.stem == measured.stem
            and fnmatch.fnmatchcase(kernel.name, name)
            and list(kernel.types[: len(types)]) == types
            and all(word in kernel.arguments for word in arguments)
        )

    @property
    def launch(self) -> int | None:
        """Which launch of the kernel, from 1; None: all."""
        return next((int(word[1:]) for word in self.kernel.split() if word.startswith("#")), None)

    def holds(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


def _is_argument(word: str) -> bool:
    return word.isdigit() or word in ("true", "false")


@dataclass(frozen=True)
class Budgets:
    """The file: the sizes that each profile program is built with, by stem, and lines."""

    sizes: Mapping[str, Mapping[str, int]]
    lines: Sequence[Line]

    def flags(self, stem: str) -> list[str]:
        return [f"-D{name}={value}" for name, value in self.sizes.get(stem, {}).items()]


def read(text: str, name: str = "budgets") -> Budgets:
    """Parses the file.

    Raises:
        BudgetError: a line is neither ``[STEM]``, nor ``NAME = SIZE``, nor ``KERNEL | METRIC | LIMIT``, nor a comment.
    """
    sizes: dict[str, dict[str, int]] = {}
    lines: list[Line] = []
    stem = ""
    for number, whole in enumerate(text.splitlines(), 1):
        # a comment begins at "# "; "#2" is a launch
        line = whole.partition("# ")[0].strip() if whole.strip() != "#" else ""
        place = f"{name}:{number}"
        if not line:
            continue
        if line.startswith("[") and line.endswith("]"):
            stem = line[1:-1].strip()
            if stem in sizes:
                raise BudgetError(f"{place}: [{stem}] stands above already")
            sizes[stem] = {}
            continue
        if not stem:
            raise BudgetError(f"{place}: expected [STEM], of a profile_STEM.cu, before all else, got {whole!r}")
        if "|" not in line:
            variable, equals, value = (part.strip() for part in line.partition("="))
            if not equals or not variable.isidentifier():
                raise BudgetError(f"{place}: expected NAME = SIZE or KERNEL | METRIC | LIMIT, got {whole!r}")
            sizes[stem][variable] = int(evaluate(value, sizes[stem], place))
            continue
        parts = [part.strip() for part in line.split("|")]
        if len(parts) != 3 or not all(parts):
            raise BudgetError(f"{place}: expected KERNEL | METRIC | LIMIT, got {whole!r}")
        kernel, metric, limit = parts
        if metric not in LAUNCH_METRICS and metric not in CODE_METRICS:
            known = ", ".join((*LAUNCH_METRICS, *CODE_METRICS))
            raise BudgetError(f"{place}: metric {metric!r} is none of {known}")
        at_least = limit.startswith(">=")
        value = evaluate(limit.removeprefix(">=").removeprefix("<="), sizes[stem], place)
        lines.append(Line(number, stem, kernel, metric, value, at_least))
    return Budgets(sizes, lines)


_OPERATORS: dict[type, Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
}


def evaluate(expression: str, sizes: Mapping[str, float], place: str) -> float:
    """An expression of numbers, sizes, ``+ - * / // **`` and brackets."""

    def value(node: ast.AST) -> float:
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
            return node.value
        if isinstance(node, ast.Name):
            if node.id not in sizes:
                raise BudgetError(f"{place}: no size {node.id}; give it in this section, as {node.id} = NUMBER")
            return sizes[node.id]
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](value(node.operand))
        raise BudgetError(f"{place}: expected numbers, sizes and + - * / // ** (), got {expression.strip()!r}")

    try:
        return value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError, TypeError) as error:
        raise BudgetError(f"{place}: {expression.strip()!r}: {error}") from error


# ---- verdicts -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """A row of the table; `measured` is None where cuobjdump would be needed."""

    kernel: str
    metric: str
    measured: float | None
    line: Line

    @property
    def good(self) -> bool:
        return self.measured is None or self.line.holds(self.measured)


def verdicts(line: Line, launches: Iterable[Launches], codes: Iterable[Code]) -> list[Verdict]:
    """A row for each kernel that the line's KERNEL matches: the launch, or the architecture, that is worst.

    Instances of a template for other alignments stand beside those for the usual one. So a line that says AT MOST holds
    for all instances, one that says AT LEAST for the best, on each architecture.
    """
    worst = min if line.at_least else max
    if line.metric in LAUNCH_METRICS:
        rows = []
        for launched in launches:
            values = launched.values(LAUNCH_METRICS[line.metric])
            if line.matches(launched):
                chosen = values if line.launch is None else values[line.launch - 1 : line.launch]
                if chosen:
                    rows.append(Verdict(str(launched.kernel), line.metric, worst(chosen), line))
        return rows
    groups: dict[str, dict[str, list[float | None]]] = {}
    for code in codes:
        if line.matches(code):
            of_kernel = groups.setdefault(" ".join((code.kernel.name, *code.kernel.types)), {})
            of_kernel.setdefault(code.architecture, []).append(getattr(code, line.metric))
    return [Verdict(name, line.metric, _of_code(group, line), line) for name, group in groups.items()]


def _of_code(group: Mapping[str, Sequence[float | None]], line: Line) -> float | None:
    known = [[value for value in values if value is not None] for values in group.values()]
    if not all(known):
        return None
    return min(map(max, known)) if line.at_least else max(map(max, known))


def without_budget(budgets: Budgets, launches: Iterable[Launches]) -> list[Launches]:
    """Kernels that no line is about."""
    return [x for x in launches if not any(line.matches(x) for line in budgets.lines)]


def unseen(launches: Iterable[Launches], codes: Sequence[Code]) -> list[Launches]:
    """Kernels whose code has shared memory, of which the emulator saw no access: their `ways` mean nothing."""
    found = []
    for x in launches:
        shared = [
            code.shared for code in codes if (code.kernel.name, code.kernel.types) == (x.kernel.name, x.kernel.types)
        ]
        if shared and min(shared) >= 1024 and not any(x.values("shared_requests")):
            found.append(x)
    return found


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they must be."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def shown(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value == int(value) else f"{value:,.3f}"
