"""Where the updates of a model's layers lie in theta_D."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from itertools import accumulate
from typing import Protocol

from torch import Tensor

from unilora_ext.updates import DenseUpdate, LowRankUpdate, Update

__all__ = ["Layout", "Order", "Range", "Reduction", "Slot", "joined"]

Range = tuple[int, int]
"""Positions [start, stop)."""


class Order(Enum):
    """What theta_D holds of each module. The values are written in adapter files."""

    B_A = "per module in named_modules order: vec_row(B [m, r]), vec_row(A [r, n])"
    """The paper's (section 3.1)."""
    A_B = "per module in named_modules order: vec_row(A [r, n]), vec_row(B [m, r])"
    """PEFT's."""
    DENSE = "per module in named_modules order: vec_row(dW [m, n])"


class Reduction(Protocol):
    """What processes that hold parts of one layer do together. Hashable."""

    def __call__(self, theta_d: Tensor) -> Tensor:
        """theta_d; in the backward, its gradient is summed over the processes."""

    def broadcast_(self, theta_d: Tensor) -> None:
        """Overwrites theta_d with that of the first process."""


@dataclass(frozen=True)
class Slot:
    """A layer's place in theta_D, or that of one process's slice of the layer.

    Attributes:
        ranges: its positions, in the order of the layout.
        m, n: shape of the (slice of the) weight.
        r: rank.
        order: of the layout.
        reduction: of the processes that hold the other slices; None where this one is the whole.
    """

    ranges: tuple[Range, ...]
    m: int
    n: int
    r: int
    order: Order
    reduction: Reduction | None = None

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Of the matrices, as they lie in theta_D."""
        A, B = (self.r, self.n), (self.m, self.r)
        return {Order.B_A: (B, A), Order.A_B: (A, B), Order.DENSE: ((self.m, self.n),)}[self.order]

    def update(self, matrices: Sequence[Tensor], scaling: float) -> Update:
        """The layer's update from its matrices, as they lie in theta_D."""
        if self.order is Order.DENSE:
            return DenseUpdate(matrices[0], scaling)
        A, B = matrices if self.order is Order.A_B else matrices[::-1]
        return LowRankUpdate(A, B, scaling)


@dataclass(frozen=True)
class Layout:
    """theta_D of a model.

    Attributes:
        shapes: (m, n) of every adapted weight, in ``named_modules()`` order.
        r: rank.
        order: what theta_D holds of each.
    """

    shapes: tuple[tuple[int, int], ...]
    r: int
    order: Order = Order.B_A

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The first position of every module, and D."""
        dense = self.order is Order.DENSE
        return tuple(accumulate((m * n if dense else (m + n) * self.r for m, n in self.shapes), initial=0))

    @property
    def D(self) -> int:
        """The length of theta_D."""
        return self.starts[-1]

    def __len__(self) -> int:
        return len(self.shapes)

    @property
    def width(self) -> float:
        """The mean of n, the inputs of a weight."""
        return sum(n for _, n in self.shapes) / len(self.shapes)

    def range_of(self, module: int) -> Range:
        """The positions of a module."""
        return self.starts[module], self.starts[module + 1]

    def range_of_A(self, module: int) -> Range:
        """The positions of a module's vec_row(A [r, n])."""
        (start, stop), (_, n) = self.range_of(module), self.shapes[module]
        return (start, start + self.r * n) if self.order is Order.A_B else (stop - self.r * n, stop)

    def range_of_B(self, module: int) -> Range:
        """The positions of a module's vec_row(B [m, r])."""
        (start, stop), (m, _) = self.range_of(module), self.shapes[module]
        return (stop - m * self.r, stop) if self.order is Order.A_B else (start, start + m * self.r)

    def slot(
        self,
        module: int,
        outputs: Range | None = None,
        inputs: Range | None = None,
        reduction: Reduction | None = None,
    ) -> Slot:
        """The place of a slice of a weight W [m, n]: rows `outputs`, columns `inputs`; None: all of them."""
        m, n = self.shapes[module]
        (m0, m1), (n0, n1) = outputs or (0, m), inputs or (0, n)

        def columns(start: int, rows: Range) -> list[Range]:  # of a matrix with n columns
            return [(start + k * n + n0, start + k * n + n1) for k in range(*rows)]

        if self.order is Order.DENSE:
            ranges = columns(self.starts[module], (m0, m1))
        else:
            of_A = columns(self.range_of_A(module)[0], (0, self.r))
            start_B = self.range_of_B(module)[0]
            of_B = [(start_B + m0 * self.r, start_B + m1 * self.r)]
            ranges = [*of_A, *of_B] if self.order is Order.A_B else [*of_B, *of_A]
        return Slot(tuple(joined(ranges)), m1 - m0, n1 - n0, self.r, self.order, reduction)


def joined(ranges: Sequence[Range]) -> list[Range]:
    """Ranges with neighbours merged and empty ones left out; the order is kept."""
    result: list[Range] = []
    for start, stop in ranges:
        if start == stop:
            continue
        if result and result[-1][1] == start:
            start = result.pop()[0]
        result.append((start, stop))
    return result
