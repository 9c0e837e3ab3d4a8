"""peft: the index of PEFT's UniLora, version 0.21."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from unilora_ext.errors import UniLoRAError
from unilora_ext.layout import Order
from unilora_ext.projections.base import Given, faking, ordinary
from unilora_ext.projections.indexed import IndexedProjection


class PeftProjection(IndexedProjection):
    """PEFT's own assignment, so that the same seed and theta_d give the same matrices as ``peft.UniLoraConfig``:
    floor(D / d) copies of every column, D mod d columns drawn for the rest, shuffled by NumPy's default generator.
    In theta_D each layer's A lies before its B.

    A shuffle is one sequence: any range of it needs the whole, so the index is made once on the CPU and kept there,
    4 bytes an element of theta_D.

    Args:
        D, d: rows and columns.
        seed: integer in [0, 2^63).
        materialize: True or None.
        version: 1 or None.

    Raises:
        UniLoRAError: ``materialize=False``.
    """

    name = "peft"
    order = Order.A_B

    def __init__(
        self, D: int, d: int, seed: int = 0, materialize: bool | None = None, version: int | None = None
    ) -> None:
        super().__init__(D, d, seed, version)
        if materialize is False:
            raise UniLoRAError("PeftProjection: materialize: expected True or None (a shuffle is stored), got False")
        self._index: Tensor | None = None

    @classmethod
    def of(cls, given: Given) -> PeftProjection:
        return cls(given.layout.D, given.d, given.seed, given.materialize, given.version)

    def _shuffled(self) -> Tensor:
        """int32 [D] on the CPU."""
        if self._index is None:
            generator = np.random.default_rng(self.seed)
            copies, rest = divmod(self.D, self.d)
            index = np.repeat(np.arange(self.d), copies)
            if rest:
                index = np.concatenate([index, generator.choice(self.d, size=rest, replace=False)])
            generator.shuffle(index)  # of int64: NumPy shuffles int32 to the same order, at half the speed
            self._index = ordinary(lambda: torch.from_numpy(index.astype(np.int32)))
        return self._index

    def columns(self, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
        self._check_range(start, stop)
        if torch.device(device).type == "meta" or faking():
            return torch.empty(stop - start, dtype=torch.int32, device=device)
        return self._shuffled()[start:stop].to(device)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_index": None}
