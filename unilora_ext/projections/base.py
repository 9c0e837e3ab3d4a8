"""P of theta_D = P theta_d, for matrices with one non-zero in a row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unilora_ext import _C, ops
from unilora_ext.errors import UniLoRAError
from unilora_ext.projections.rows import Rows, SeededRows, StoredRows, faking

__all__ = ["Projection", "SeededProjection"]


_MOST_STORED = 1 << 27  # 512 MiB of index


class Projection(ABC):
    """A fixed matrix P [D, d] with one non-zero in each row and columns of norm 1 (paper, section 3.2).

    Immutable: copies share it. What the operators read of it is made at first use on a device and kept, see
    :meth:`rows`: as ordinary tensors, whatever mode the first use is in, for the uses that follow.

    Attributes:
        name: name of the index algorithm in an adapter file.
        version: version of the index algorithm in an adapter file.
        versions: all that there are of it, ascending.
        a_first: whether each layer's A lies before its B in theta_D (PEFT), not after it (paper).
        D: number of rows, the length of theta_D.
        d: number of columns, the length of theta_d.
    """

    name: str
    version: int
    versions: tuple[int, ...] = (1,)
    a_first = False

    def __init__(self, D: int, d: int) -> None:
        limit = _C.max_elements
        for what, value in (("D", D), ("d", d)):
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
                raise UniLoRAError(f"{type(self).__name__}: {what}: expected an integer in [1, {limit}], got {value!r}")
        self.D, self.d = D, d
        self._rows: dict[torch.device, Rows] = {}
        self._scales: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @abstractmethod
    def columns(self, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
        """The columns of rows [start, stop): int32 [stop - start] on `device`, computed for this range alone."""

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """What an adapter file keeps of P, beside D and d; raises where P has no short description."""

    # -- what is derived ----------------------------------------------------------------------------------------------

    def rows(self, device: torch.device | str, ranges: Sequence[tuple[int, int]] | None = None) -> Rows:
        """The rows of `ranges`, one after the other, on `device`; None: all rows (made once a device and kept)."""
        device, whole = torch.device(device), [(0, self.D)]
        kept = not faking() and (ranges is None or list(ranges) == whole)
        if kept and device in self._rows:
            return self._rows[device]
        with torch.inference_mode(False):
            rows = self._make_rows(device, whole if ranges is None else ranges)
        if kept:
            self._rows[device] = rows
        return rows

    def _make_rows(self, device: torch.device, ranges: Sequence[tuple[int, int]]) -> Rows:
        parts = [self.columns(start, stop, device=device) for start, stop in ranges]
        return StoredRows(self, parts[0] if len(parts) == 1 else torch.cat(parts))

    @property
    def index(self) -> Tensor:
        """int32 [D] on the CPU: the column of each row."""
        rows = self.rows("cpu")
        return rows.index if isinstance(rows, StoredRows) else self.columns(0, self.D)

    @property
    def counts(self) -> Tensor:
        """int32 [d] on the CPU: n_j, the number of rows in column j."""
        step = 1 << 24  # a stretch at a time: D may be large
        counts = torch.zeros(self.d, dtype=torch.int64, device="cpu")
        for start in range(0, self.D, step):
            counts += torch.bincount(self.columns(start, min(self.D, start + step)), minlength=self.d)
        return counts.int()

    def column_scale(self) -> Tensor:
        """float64 [d] on the CPU: 1 / sqrt(n_j), 0 for an empty column."""
        return self.scale_on(torch.device("cpu"), torch.float64)

    def scale_on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """:meth:`column_scale` in `dtype` on `device`, kept."""
        if faking():
            return torch.empty(self.d, device=device, dtype=dtype)
        if (device, dtype) not in self._scales:
            with torch.inference_mode(False):
                self._scales[device, dtype] = self._make_scale(device, dtype)
        return self._scales[device, dtype]

    def _make_scale(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        if device.type != "cpu" or dtype != torch.float64:
            return self.column_scale().to(device=device, dtype=dtype)
        counts = self.counts.double()
        return torch.where(counts > 0, counts.rsqrt(), 0.0)

    @property
    def scale(self) -> Tensor:
        """float32 [d] on the CPU: 1 / sqrt(n_j), 0 for an empty column."""
        return self.scale_on(torch.device("cpu"), torch.float32)

    def __call__(self, theta_d: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """theta_D = P theta_d, differentiable.

        Args:
            theta_d: [d], float32 or float64 (half types are widened to float32), on any device.
            dtype: of the result; default: that of `theta_d`.

        Returns:
            theta_D: [D] on the device of `theta_d`.
        """
        self._check_vector("theta_d", theta_d, self.d)
        return ops.project(theta_d, self.rows(theta_d.device), dtype)

    def transpose(self, g_D: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """P^T g_D, differentiable: [D] -> [d], summed in float32 (float64 for float64) in a fixed order."""
        self._check_vector("g_D", g_D, self.D)
        return ops.project_transpose(g_D, self.rows(g_D.device), dtype)

    def dense(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """P as a dense matrix [D, d] on the CPU: for tests and small examples."""
        matrix = torch.zeros(self.D, self.d, dtype=dtype, device="cpu")
        columns = self.index.long()
        matrix[torch.arange(self.D, device="cpu"), columns] = self.column_scale().to(dtype)[columns]
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
        return {**self.__dict__, "_rows": {}, "_scales": {}}


class SeededProjection(Projection):
    """A projection whose index is a function of a seed.

    Args:
        D, d: rows and columns.
        seed: integer in [0, 2^63).
        materialize: True: the index is stored, 4 bytes an element of theta_D (8 on CUDA). False: it is computed anew
            in every projection, 0 bytes, on the CPU; values and gradients are the same to the bit. None: stored,
            but for D > 2^27 on the CPU.
        version: of the index algorithm; None: the newest.
    """

    def __init__(
        self, D: int, d: int, seed: int = 0, materialize: bool | None = None, version: int | None = None
    ) -> None:
        super().__init__(D, d)
        self.version = self.versions[-1] if version is None else version
        if self.version not in self.versions:
            raise UniLoRAError(f"{type(self).__name__}: version: expected one of {self.versions}, got {version!r}")
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
            raise UniLoRAError(f"{type(self).__name__}: seed: expected an integer in [0, 2^63), got {seed!r}")
        self.seed, self.materialize = seed, materialize

    def columns(self, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
        self._check_range(start, stop)
        index = torch.empty(stop - start, dtype=torch.int32, device=device)
        if not index.is_meta:
            self._fill(index, start)
        return index

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.D:
            raise UniLoRAError(f"{self}: rows: expected 0 <= start <= stop <= {self.D}, got {start}, {stop}")

    @abstractmethod
    def _fill(self, index: Tensor, start: int) -> None:
        """Writes the columns of positions start, start + 1, ... into `index`."""

    def _make_rows(self, device: torch.device, ranges: Sequence[tuple[int, int]]) -> Rows:
        if self.materialize is False and device.type == "cuda":
            raise UniLoRAError(f"{self}: materialize=False: expected rows on the CPU, got {device}")
        stored = self.materialize if self.materialize is not None else self.D <= _MOST_STORED
        if stored or device.type != "cpu":
            return super()._make_rows(device, ranges)
        return SeededRows(self, ranges)

    def spec(self) -> dict[str, Any]:
        return {"name": self.name, "version": self.version, "seed": self.seed}

    def __repr__(self) -> str:
        return f"{type(self).__name__}(D={self.D}, d={self.d}, seed={self.seed})"
