"""Rows of P on one device: what the operators read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unilora_ext import trace

if TYPE_CHECKING:
    from unilora_ext.projections.base import Projection, SeededProjection

__all__ = ["Rows", "SeededRows", "StoredRows", "faking"]

ops = torch.ops.unilora


def faking() -> bool:
    """Whether tensors are fakes now (``FakeTensorMode``): what is made then has no values and cannot be kept."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


class Rows(ABC):
    """Some rows of P on one device.

    Args:
        projection: P.
        device: where theta_d and theta_D of these rows are.
    """

    def __init__(self, projection: Projection, device: torch.device) -> None:
        self.projection, self.device = projection, device

    def scale(self, dtype: torch.dtype) -> Tensor:
        """1 / sqrt(n_j), [d], in `dtype` on this device; 0 for an empty column."""
        return self.projection.scale_on(self.device, dtype)

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    def gather(self, theta_d: Tensor, dtype: torch.dtype) -> Tensor:
        """theta_D of these rows, in `dtype`, from theta_d [d], float32 or float64."""
        with trace.span("unilora::project"):
            return self._gather(theta_d, dtype)

    def scatter(self, g_D: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """g_d [d] in `dtype`, float32 or float64, from g_D of these rows, in pieces that lie end to end."""
        with trace.span("unilora::project_backward"):
            return self._scatter(g_D, dtype)

    @abstractmethod
    def _gather(self, theta_d: Tensor, dtype: torch.dtype) -> Tensor: ...

    @abstractmethod
    def _scatter(self, g_D: Sequence[Tensor], dtype: torch.dtype) -> Tensor: ...

    @abstractmethod
    def operands(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """The operator that gathers these rows from theta_d in `dtype`, and what it takes between theta_d and the dtype
        of the result."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes kept, beside the d numbers of :meth:`scale`."""


class StoredRows(Rows):
    """Rows with a stored index: 4 bytes a row; on CUDA 8, once gradients are wanted.

    Args:
        projection: P.
        index: int32 [n], the column of each row.
    """

    def __init__(self, projection: Projection, index: Tensor) -> None:
        super().__init__(projection, index.device)
        self.index = index
        self._members: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.index)

    def members(self) -> tuple[Tensor, Tensor]:
        """(order int32 [n], offsets int32 [d + 1]): column j has the rows ``order[offsets[j]:offsets[j + 1]]``, in
        ascending order. Made once."""
        if self._members is None:
            self._members = self._sorted()
        return self._members

    @torch.inference_mode(False)  # kept, for calls in other modes too
    def _sorted(self) -> tuple[Tensor, Tensor]:
        columns, order = torch.sort(self.index, stable=True)
        bounds = torch.arange(self.projection.d + 1, dtype=columns.dtype, device=columns.device)
        return order.int(), torch.searchsorted(columns, bounds).int()

    def _gather(self, theta_d: Tensor, dtype: torch.dtype) -> Tensor:
        return ops.project(theta_d, self.scale(theta_d.dtype), self.index, None, dtype)

    def _scatter(self, g_D: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        if self.index.is_cuda:
            whole = g_D[0] if len(g_D) == 1 else torch.cat([piece.flatten() for piece in g_D])
            return ops.project_segment_sum(whole, self.scale(dtype), *self.members(), None)
        return ops.project_scatter(g_D, self.scale(dtype), self.index, None)

    def operands(self, dtype: torch.dtype) -> tuple[Any, ...]:
        return "project", self.scale(dtype), self.index, None

    @property
    def nbytes(self) -> int:
        return self.index.nbytes + sum(t.nbytes for t in self._members or ())


class SeededRows(Rows):
    """Rows whose index is computed on the way: nothing is kept. On the CPU.

    Args:
        projection: P, seeded.
        ranges: (start, stop) pairs of the rows.
    """

    def __init__(self, projection: SeededProjection, ranges: Sequence[tuple[int, int]]) -> None:
        super().__init__(projection, torch.device("cpu"))
        bounds = [bound for pair in ranges for bound in pair]
        self._source = projection.name, projection.version, projection.D, projection.seed, bounds
        self._len = sum(stop - start for start, stop in ranges)

    def __len__(self) -> int:
        return self._len

    def _gather(self, theta_d: Tensor, dtype: torch.dtype) -> Tensor:
        return ops.project_seeded(theta_d, self.scale(theta_d.dtype), *self._source, dtype)

    def _scatter(self, g_D: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return ops.project_seeded_scatter(g_D, self.scale(dtype), *self._source)

    def operands(self, dtype: torch.dtype) -> tuple[Any, ...]:
        return "project_seeded", self.scale(dtype), *self._source

    @property
    def nbytes(self) -> int:
        return 0
