"""vera: random matrices that all modules share, scaled by vectors of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from unilora_ext.layout import Layout, Range
from unilora_ext.projections.base import Given, Option, faking, ordinary
from unilora_ext.projections.draws import Draws, Purpose
from unilora_ext.projections.indexed import IndexedProjection

__all__ = ["VeraProjection", "largest", "parts_of", "scaled_size"]


class VeraProjection(IndexedProjection):
    """VeRA (Kopiczko et al., arXiv 2310.11454, equation 2): B = diag(b) P_B[:m], A = diag(g) P_A[:, :n], with P_A [r,
    max n] and P_B [max m, r] drawn once for the model, Kaiming uniform, and frozen. theta_d = [g (r), b (m)] for each
    module in turn. A row of P has one non-zero, so the operators are those of Uni-LoRA.

    Starts with b = 0 and g = d_initial.

    Args:
        layout: of theta_D.
        seed: of P_A and P_B.
        version: 1 or None.
        **options: see :attr:`Projection.options`.
    """

    name = "vera"
    options: ClassVar[Mapping[str, Option]] = {"d_initial": Option(0.1, "what the elements of g start from")}
    learning_rates: ClassVar[Mapping[str, float]] = {"theta_d": 4e-3}

    def __init__(self, layout: Layout, seed: int = 0, version: int | None = None, **options: Any) -> None:
        super().__init__(layout.D, scaled_size(layout), seed, version, **options)
        self.layout, self._largest = layout, largest(layout)
        self._matrices: tuple[np.ndarray, np.ndarray] | None = None

    @classmethod
    def size(cls, layout: Layout, options: Mapping[str, Any]) -> int:
        return scaled_size(layout)

    @classmethod
    def of(cls, given: Given) -> VeraProjection:
        return cls(given.layout, given.seed, given.version, **given.options)

    def start(self, dtype: torch.dtype, bound: float | None = None) -> dict[str, Tensor]:
        self._no_bound(bound)
        theta_d = torch.zeros(self.d, dtype=dtype, device="cpu")
        for first, last in parts_of(self.layout):
            theta_d[first : min(first + self.layout.r, last)] = self.given_options["d_initial"]
        return {"theta_d": theta_d}

    def matrices(self) -> tuple[np.ndarray, np.ndarray]:
        """P_A [r, max n] and P_B [max m, r], float32."""
        if self._matrices is None:
            (m, n), r = self._largest, self.layout.r
            of_A, of_B = (Draws(self.seed, purpose) for purpose in (Purpose.VERA_A, Purpose.VERA_B))
            self._matrices = _kaiming(of_A, r, n), _kaiming(of_B, m, r)
        return self._matrices

    def columns(self, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
        r = self.layout.r

        def of_module(module: int, first: int) -> tuple[np.ndarray, np.ndarray]:
            m, n = self.layout.shapes[module]
            return np.repeat(np.arange(first + r, first + r + m), r), np.repeat(np.arange(first, first + r), n)

        return self._rows(start, stop, device, of_module, torch.int32)

    def values(self, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
        def of_module(module: int, first: int) -> tuple[np.ndarray, np.ndarray]:
            (m, n), (P_A, P_B) = self.layout.shapes[module], self.matrices()
            return P_B[:m].reshape(-1), P_A[:, :n].reshape(-1)

        return self._rows(start, stop, device, of_module, torch.float32)

    def _rows(self, start: int, stop: int, device: torch.device | str, of_module: Any, dtype: torch.dtype) -> Tensor:
        """Rows [start, stop) of what `of_module` gives for B and A of a module and its first column."""
        self._check_range(start, stop)
        rows = torch.empty(stop - start, dtype=dtype, device=device)
        if rows.is_meta or faking():
            return rows
        for module, (first, _) in enumerate(parts_of(self.layout)):
            begin, end = self.layout.range_of(module)
            if begin >= stop or end <= start:
                continue
            low, high = max(start, begin), min(stop, end)
            whole = np.concatenate(of_module(module, first))
            part = ordinary(lambda: torch.from_numpy(whole[low - begin : high - begin]))  # noqa: B023
            rows[low - start : high - start] = part
        return rows

    def _make_scale(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.ones(self.d, dtype=dtype, device=device)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_matrices": None}


def largest(layout: Layout) -> tuple[int, int]:
    """(max m, max n)"""
    return max(m for m, _ in layout.shapes), max(n for _, n in layout.shapes)


def scaled_size(layout: Layout) -> int:
    """Number of elements of all g and b."""
    return sum(m + layout.r for m, _ in layout.shapes)


def parts_of(layout: Layout) -> list[Range]:
    """Where [g (r), b (m)] of every module lies in theta_d."""
    parts, start = [], 0
    for m, _ in layout.shapes:
        parts.append((start, start + layout.r + m))
        start += layout.r + m
    return parts


def _kaiming(draws: Draws, rows: int, columns: int) -> np.ndarray:
    """Kaiming uniform [rows, columns] with fan_in = columns, as PEFT has it."""
    bound = math.sqrt(6 / columns)
    return ((2 * draws.uniform(0, rows * columns) - 1) * bound).astype(np.float32).reshape(rows, columns)
