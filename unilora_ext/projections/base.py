"""P of theta_D = P theta_d, for matrices with one non-zero in a row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unilora_ext import _C, ops
from unilora_ext.errors import UniLoRAError

__all__ = ["Projection", "RowBlock"]


class RowBlock:
    """Rows of P on one device: what the operators read.

    Attributes:
        index: int32 [n], the column of each row.
        order: int32 [n], the rows sorted by column, or None for a block that is used rarely.
        offsets: int32 [d + 1], where each column starts in `order`, or None.
    """

    def __init__(self, projection: Projection, index: Tensor, *, sort: bool) -> None:
        self._projection = projection
        self._scales: dict[torch.dtype, Tensor] = {}
        self.index = index
        self.order, self.offsets = ops.segment_order(index, projection.d) if sort else (None, None)

    def scale(self, dtype: torch.dtype) -> Tensor:
        """1 / sqrt(n_j), [d], in `dtype` on this block's device; 0 for an empty column."""
        if dtype not in self._scales:
            self._scales[dtype] = self._projection.column_scale().to(device=self.index.device, dtype=dtype)
        return self._scales[dtype]

    def rows(self, start: int, stop: int) -> RowBlock:
        """Rows [start, stop) of this block, as a view."""
        part = RowBlock(self._projection, self.index[start:stop], sort=False)
        part._scales = self._scales
        return part


class Projection(ABC):
    """A fixed matrix P [D, d] with one non-zero in each row and columns of norm 1 (paper, section 3.2).

    Immutable: copies share it. Its tables are made at first use on a device and kept: 8 bytes an element of theta_D.

    Attributes:
        name: name of the index algorithm in an adapter file.
        version: version of the index algorithm in an adapter file.
        D: number of rows, the length of theta_D.
        d: number of columns, the length of theta_d.
    """

    name: str
    version: int

    def __init__(self, D: int, d: int) -> None:
        limit = _C.max_elements
        for what, value in (("D", D), ("d", d)):
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
                raise UniLoRAError(f"{type(self).__name__}: {what}: expected an integer in [1, {limit}], got {value!r}")
        self.D, self.d = D, d
        self._blocks: dict[torch.device, RowBlock] = {}
        self._column_scale: Tensor | None = None

    @abstractmethod
    def columns(self, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
        """The columns of rows [start, stop): int32 [stop - start] on `device`, computed for this range alone."""

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """What an adapter file keeps of P, beside D and d; raises where P has no short description."""

    # -- what is derived ----------------------------------------------------------------------------------------------

    def block(self, device: torch.device | str, ranges: Sequence[tuple[int, int]] | None = None) -> RowBlock:
        """The rows of `ranges`, one after the other, on `device`; None: all rows (made once a device and kept)."""
        device = torch.device(device)
        if ranges is not None and list(ranges) != [(0, self.D)]:
            return RowBlock(self, torch.cat([self.columns(*r, device=device) for r in ranges]), sort=True)
        if device not in self._blocks:
            self._blocks[device] = RowBlock(self, self.columns(0, self.D, device=device), sort=True)
        return self._blocks[device]

    @property
    def index(self) -> Tensor:
        """int32 [D] on the CPU: the column of each row."""
        return self.block("cpu").index

    @property
    def counts(self) -> Tensor:
        """int32 [d] on the CPU: n_j, the number of rows in column j."""
        return torch.bincount(self.columns(0, self.D), minlength=self.d).int()

    def column_scale(self) -> Tensor:
        """float64 [d] on the CPU: 1 / sqrt(n_j), 0 for an empty column."""
        if self._column_scale is None:
            counts = self.counts.double()
            self._column_scale = torch.where(counts > 0, counts.rsqrt(), 0.0)
        return self._column_scale

    @property
    def scale(self) -> Tensor:
        """float32 [d] on the CPU: 1 / sqrt(n_j), 0 for an empty column."""
        return self.column_scale().float()

    def __call__(self, theta_d: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """theta_D = P theta_d, differentiable.

        Args:
            theta_d: [d], float32 or float64 (half types are widened to float32), on any device.
            dtype: of the result; default: that of `theta_d`.

        Returns:
            theta_D: [D] on the device of `theta_d`.
        """
        self._check_vector("theta_d", theta_d, self.d)
        return ops.project(theta_d, self.block(theta_d.device), dtype)

    def transpose(self, g_D: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """P^T g_D, differentiable: [D] -> [d], summed in float32 (float64 for float64) in a fixed order."""
        self._check_vector("g_D", g_D, self.D)
        return ops.project_transpose(g_D, self.block(g_D.device), dtype)

    def dense(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """P as a dense matrix [D, d] on the CPU: for tests and small examples."""
        matrix = torch.zeros(self.D, self.d, dtype=dtype)
        columns = self.index.long()
        matrix[torch.arange(self.D), columns] = self.column_scale().to(dtype)[columns]
        return matrix

    def _check_vector(self, what: str, value: Tensor, length: int) -> None:
        if tuple(value.shape) != (length,) or not value.is_floating_point():
            raise UniLoRAError(
                f"{self}: {what}: expected a floating tensor of shape [{length}], "
                f"got {value.dtype} of shape {list(value.shape)}"
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}(D={self.D}, d={self.d})"

    def __deepcopy__(self, memo: dict) -> Projection:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_blocks": {}, "_column_scale": None}


class SeededProjection(Projection):
    """A projection whose index is a function of a seed.

    Attributes:
        seed: integer in [0, 2^63).
    """

    def __init__(self, D: int, d: int, seed: int = 0) -> None:
        super().__init__(D, d)
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
            raise UniLoRAError(f"{type(self).__name__}: seed: expected an integer in [0, 2^63), got {seed!r}")
        self.seed = seed

    def columns(self, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
        if not 0 <= start <= stop <= self.D:
            raise UniLoRAError(f"{self}: rows: expected 0 <= start <= stop <= {self.D}, got {start}, {stop}")
        index = torch.empty(stop - start, dtype=torch.int32, device=device)
        if not index.is_meta:
            self._fill(index, start)
        return index

    @abstractmethod
    def _fill(self, index: Tensor, start: int) -> None:
        """Writes the columns of positions start, start + 1, ... into `index`."""

    def spec(self) -> dict[str, Any]:
        return {"name": self.name, "version": self.version, "seed": self.seed}

    def __repr__(self) -> str:
        return f"{type(self).__name__}(D={self.D}, d={self.d}, seed={self.seed})"
