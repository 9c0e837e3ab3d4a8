"""Projections with one non-zero a row, each stretch of rows in columns of its own."""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from unilora_ext.errors import UniLoRAError
from unilora_ext.layout import Layout
from unilora_ext.projections.base import Given, Option
from unilora_ext.projections.indexed import NORMALIZE, IndexedProjection

__all__ = ["SegmentedProjection", "Stretch", "stored_only"]

operators = torch.ops.unilora


class Stretch(NamedTuple):
    """Rows [start, stop), whose columns are drawn from [first, first + columns)."""

    start: int
    stop: int
    first: int
    columns: int


class SegmentedProjection(IndexedProjection):
    """Every row's column is drawn uniformly and independently among those of its stretch: the algorithm of
    :class:`~unilora_ext.projections.UniformProjection`, with the number of columns of the stretch.

    Args:
        layout: of theta_D.
        d: number of columns.
        seed: integer in [0, 2^63).
        materialize: True or None: the index is stored; False is refused.
        version: 1 or None.
        **options: see :attr:`Projection.options`.

    Raises:
        UniLoRAError: d is too small for the stretches.
    """

    options: ClassVar[Mapping[str, Option]] = NORMALIZE

    def __init__(
        self,
        layout: Layout,
        d: int,
        seed: int = 0,
        materialize: bool | None = None,
        version: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(layout.D, d, seed, version, **options)
        stored_only(self, materialize)
        self.stretches = tuple(self._stretches(layout, d))
        self._starts = [stretch.start for stretch in self.stretches]

    @classmethod
    @abstractmethod
    def _stretches(cls, layout: Layout, d: int) -> Sequence[Stretch]:
        """Stretches that lie end to end, from row 0 to D."""

    @classmethod
    def of(cls, given: Given) -> SegmentedProjection:
        return cls(given.layout, given.d, given.seed, given.materialize, given.version, **given.options)

    def columns(self, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
        self._check_range(start, stop)
        index = torch.empty(stop - start, dtype=torch.int32, device=device)
        if index.is_meta or start == stop:
            return index
        for stretch in self.stretches[bisect_right(self._starts, start) - 1 :]:
            if stretch.start >= stop:
                break
            low, high = max(start, stretch.start), min(stop, stretch.stop)
            part = index[low - start : high - start]
            operators.fill_index(part, "uniform", 1, self.D, stretch.columns, self.seed, low)
            part += stretch.first
        return index


def stored_only(projection: IndexedProjection, materialize: bool | None) -> None:
    """Raises where an index that is computed anew is asked for."""
    if materialize is False:
        raise UniLoRAError(
            f"materialize: expected True or None for '{projection.name}', whose index is always stored; got False"
        )
