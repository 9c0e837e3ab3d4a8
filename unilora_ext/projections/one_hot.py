"""Any given index."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unilora_ext.errors import UniLoRAError
from unilora_ext.projections.base import Given, faking, ordinary
from unilora_ext.projections.indexed import IndexedProjection


class OneHotProjection(IndexedProjection):
    """P with a given column for each row.

    Args:
        index: integer tensor or sequence [D], values in [0, d).
        d: number of columns.
    """

    name = "onehot"

    def __init__(self, index: Tensor, d: int) -> None:
        given = index if isinstance(index, Tensor) else torch.tensor(index, device="cpu")
        if given.dim() != 1 or given.numel() == 0 or given.is_floating_point() or given.dtype == torch.bool:
            raise UniLoRAError(
                f"OneHotProjection: index: expected a non-empty integer vector, "
                f"got {given.dtype} of shape {list(given.shape)}"
            )
        super().__init__(given.numel(), d)
        low, high = int(given.min()), int(given.max())
        if low < 0 or high >= d:
            raise UniLoRAError(f"OneHotProjection: index: expected values in [0, {d}), got values in [{low}, {high}]")
        self._index = ordinary(lambda: given.to(device="cpu", dtype=torch.int32, copy=True))

    @classmethod
    def of(cls, given: Given) -> OneHotProjection:
        raise UniLoRAError("OneHotProjection: it is made from an index, not from a layout")

    def columns(self, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
        if torch.device(device).type == "meta" or faking():
            return torch.empty(stop - start, dtype=torch.int32, device=device)
        return self._index[start:stop].to(device)

    def spec(self) -> dict[str, Any]:
        raise UniLoRAError("OneHotProjection: a given index has no seed, so it cannot be part of an adapter file")
