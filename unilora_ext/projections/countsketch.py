"""countsketch: the paper's P with a random sign a row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unilora_ext.projections.base import Given
from unilora_ext.projections.indexed import IndexedProjection
from unilora_ext.projections.segmented import stored_only
from unilora_ext.projections.uniform import UniformProjection

operators = torch.ops.unilora

_OF_SIGNS = 1 << 62
"""Added to the seed, for signs that do not depend on the columns."""


class CountSketchProjection(IndexedProjection):
    """The count sketch (Charikar et al., 2002) as P: every row's column is that of
    :class:`~unilora_ext.projections.UniformProjection`, its value 1 or -1, drawn independently, times 1/sqrt(n_j).
    P^T P = I, as without signs.

    Args:
        D, d: rows and columns.
        seed: integer in [0, 2^63).
        materialize: True or None: index and signs are stored, 8 bytes a row; False is refused.
        version: 1 or None.
    """

    name = "countsketch"
    parents = UniformProjection.parents  # the same columns; the signs do not depend on d

    def __init__(
        self, D: int, d: int, seed: int = 0, materialize: bool | None = None, version: int | None = None, **options: Any
    ) -> None:
        super().__init__(D, d, seed, version, **options)
        stored_only(self, materialize)

    @classmethod
    def of(cls, given: Given) -> CountSketchProjection:
        return cls(given.layout.D, given.d, given.seed, given.materialize, given.version, **given.options)

    def columns(self, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
        return self._drawn(start, stop, device, self.d, self.seed)

    def values(self, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
        return self._drawn(start, stop, device, 2, self.seed ^ _OF_SIGNS).float() * 2 - 1

    def _drawn(self, start: int, stop: int, device: torch.device | str, below: int, seed: int) -> Tensor:
        self._check_range(start, stop)
        drawn = torch.empty(stop - start, dtype=torch.int32, device=device)
        if not drawn.is_meta:
            operators.fill_index(drawn, "uniform", 1, self.D, below, seed, start)
        return drawn
