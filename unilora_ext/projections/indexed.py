"""Projections with one non-zero in a row: an index, and perhaps a value a row. The operators' own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from unilora_ext._native import _C
from unilora_ext._operators import below_autograd
from unilora_ext.errors import UniLoRAError
from unilora_ext.layout import Range
from unilora_ext.projections.base import Given, Option, Projection, faking, kept, ordinary
from unilora_ext.projections.restriction import Gradients, Restriction

__all__ = ["NORMALIZE", "IndexedProjection", "SeededProjection"]

operators = torch.ops.unilora

_MOST_STORED = 1 << 27  # 512 MiB of index
_MOST_PIECES = 1024  # of a gradient that the CUDA kernels read as it lies

NORMALIZE = {"normalize": Option(True, "whether column j is scaled by 1 / sqrt(n_j), which makes P isometric")}


class IndexedProjection(Projection):
    """``theta_D[i] = theta_d[index[i]] * scale[index[i]]``, times ``value[i]`` where a row has one; scale[j] is
    1 / sqrt(n_j), n_j the number of rows in column j, so that P^T P = I for values +-1 (paper, section 3.2)."""

    most_rows: ClassVar[int] = _C.max_elements

    def __init__(self, D: int, d: int, seed: int = 0, version: int | None = None, **options: Any) -> None:
        super().__init__(D, d, seed, version, options)
        self._scales: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @abstractmethod
    def columns(self, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
        """The columns of rows [start, stop): int32 [stop - start] on `device`, computed for this range alone."""

    def values(self, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor | None:
        """The value of rows [start, stop): float32 [stop - start]; None: 1 in all rows."""
        return None

    @property
    def stretch(self) -> float:
        return super().stretch if self.given_options.get("normalize", True) else 1.0

    @property
    def index(self) -> Tensor:
        """int32 [D] on the CPU: the column of each row."""
        restriction = self.restrict("cpu")
        return restriction.index if isinstance(restriction, StoredRows) else self.columns(0, self.D)

    @property
    def counts(self) -> Tensor:
        """int32 [d] on the CPU: n_j, the number of rows in column j."""
        step = 1 << 24  # a stretch at a time: D may be large
        counts = torch.zeros(self.d, dtype=torch.int64, device="cpu")
        for start in range(0, self.D, step):
            counts += torch.bincount(self.columns(start, min(self.D, start + step)), minlength=self.d)
        return counts.int()

    @property
    def scale(self) -> Tensor:
        """float32 [d] on the CPU: 1 / sqrt(n_j), 0 for an empty column."""
        return self.scale_on(torch.device("cpu"), torch.float32)

    def column_scale(self) -> Tensor:
        """:attr:`scale` in float64."""
        return self.scale_on(torch.device("cpu"), torch.float64)

    def scale_on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """:attr:`scale` in `dtype` on `device`, kept."""
        if faking():
            return torch.empty(self.d, device=device, dtype=dtype)
        if (device, dtype) not in self._scales:
            self._scales[device, dtype] = kept(device, lambda: self._make_scale(device, dtype))
        return self._scales[device, dtype]

    def _make_scale(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        if device.type != "cpu" or dtype != torch.float64:
            return self.column_scale().to(device=device, dtype=dtype)
        if not self.given_options.get("normalize", True):
            return torch.ones(self.d, dtype=dtype, device=device)
        counts = self.counts.double()
        return torch.where(counts > 0, counts.rsqrt(), 0.0)

    def _restrict(self, device: torch.device, ranges: Sequence[Range]) -> Restriction:
        def joined(parts: list[Tensor]) -> Tensor:
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        if isinstance(whole := self._restrictions.get(device), StoredRows) and not faking():
            index = [whole.index[start:stop] for start, stop in ranges]
            values = [None if whole.value is None else whole.value[start:stop] for start, stop in ranges]
        else:
            index = [self.columns(start, stop, device) for start, stop in ranges]
            values = [self.values(start, stop, device) for start, stop in ranges]
        return StoredRows(self, ranges, joined(index), None if None in values else joined(values))

    @classmethod
    def compute(
        cls, theta_d: Tensor, trained: Sequence[Tensor], operands: tuple[Any, ...], dtype: torch.dtype
    ) -> Tensor:
        if isinstance(operands[1], str):
            return operators.project_seeded(theta_d, *operands, dtype)
        scale, index, value, *members = operands
        if members and not torch.compiler.is_exporting():
            return _ProjectInGraph.apply(theta_d, scale, index, value, *members, dtype)
        return operators.project(theta_d, scale, index, value, dtype)

    def dense(self, dtype: torch.dtype = torch.float64, trained: Sequence[Tensor] = ()) -> Tensor:
        matrix = torch.zeros(self.D, self.d, dtype=dtype, device="cpu")
        columns, values = self.index.long(), self.values(0, self.D)
        of_rows = self.column_scale().to(dtype)[columns]
        matrix[torch.arange(self.D, device="cpu"), columns] = of_rows if values is None else of_rows * values
        return matrix

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.D:
            raise UniLoRAError(f"{self}: rows: expected 0 <= start <= stop <= {self.D}, got {start}, {stop}")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_scales": {}}


class SeededProjection(IndexedProjection):
    """A projection whose index is a function of a seed, computed by the native library for any range of rows.

    Args:
        D, d: rows and columns.
        seed: integer in [0, 2^63).
        materialize: True: the index is stored, 4 bytes an element of theta_D; on CUDA its sorted order too, 4 more.
            False: the index is computed anew in every projection, 0 bytes; values and gradients are the same (on the
            CPU to the bit). On CUDA the backward of `uniform` keeps the order all the same, 4 bytes. None: stored, but
            for D > 2^27 on the CPU.
        version: of the index algorithm; None: the newest.
        **options: see :attr:`Projection.options`.
    """

    options: ClassVar[Mapping[str, Option]] = NORMALIZE
    lists_members: ClassVar[bool] = False
    """Whether the rows of a column can be computed, as well as the column of a row."""

    def __init__(
        self,
        D: int,
        d: int,
        seed: int = 0,
        materialize: bool | None = None,
        version: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(D, d, seed, version, **options)
        self.materialize = materialize

    @classmethod
    def of(cls, given: Given) -> SeededProjection:
        return cls(given.layout.D, given.d, given.seed, given.materialize, given.version, **given.options)

    def columns(self, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
        self._check_range(start, stop)
        index = torch.empty(stop - start, dtype=torch.int32, device=device)
        if not index.is_meta:
            operators.fill_index(index, self.name, self.version, self.D, self.d, self.seed, start)
        return index

    def _restrict(self, device: torch.device, ranges: Sequence[Range]) -> Restriction:
        stored = self.materialize
        if stored is None:
            stored = self.D <= _MOST_STORED or device.type != "cpu"
        return super()._restrict(device, ranges) if stored else ComputedRows(self, device, ranges)


# ---- rows on a device -----------------------------------------------------------------------------------------------


class IndexedRows(Restriction):
    """Rows with one non-zero each. The transpose is a scatter; on CUDA, where a scatter needs atomics, whose order is
    not fixed, it is a sum over the members of each column."""

    projection: IndexedProjection

    def __init__(self, projection: IndexedProjection, device: torch.device, ranges: Sequence[Range]) -> None:
        super().__init__(projection, device, ranges)
        self._members: tuple[tuple[int, ...], tuple[Tensor, Tensor]] | None = None  # of these lengths

    @property
    def by_members(self) -> bool:
        """Whether the transpose needs :meth:`members`."""
        return self.device.type == "cuda"

    @property
    def nbytes(self) -> int:
        return 0 if self._members is None else sum(tensor.nbytes for tensor in self._members[1])

    @abstractmethod
    def columns(self) -> Tensor:
        """int32 [n]: the column of each row."""

    def members(self, lengths: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """(order int32 [n], offsets int32 [d + 1]): column j has the rows ``order[offsets[j]:offsets[j + 1]]``, in
        ascending order, written for a gradient in pieces of `lengths` (None: in one) as the operator ``column_members``
        does. Kept for the pieces asked for last."""
        lengths = (len(self),) if lengths is None else tuple(lengths)
        found = self._members  # once: another thread may ask for other lengths
        if found is None or found[0] != lengths:
            make = partial(self._list_members, lengths)
            found = lengths, kept(self.device, make) if self.projection.keeps_rows(self) else ordinary(make)
            self._members = found
        return found[1]

    def _list_members(self, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return operators.column_members(self.columns(), self.projection.d, lengths)

    def _segment_sum(self, pieces: Sequence[Tensor], scale: Tensor, value: Tensor | None) -> Tensor:
        pieces = _few(pieces)
        bits = (len(pieces) - 1).bit_length()  # of the number of a piece; the place in it has the others
        if max(piece.numel() for piece in pieces) > 1 << (32 - bits):
            pieces = [_joined(pieces)]
        members = self.members([piece.numel() for piece in pieces])
        return _called(operators.project_segment_sum.default, pieces, scale, *members, value)


class StoredRows(IndexedRows):
    """Rows with a stored index: 4 bytes a row; on CUDA 8, once gradients are wanted. A value a row is 4 more.

    Args:
        projection: P.
        ranges: of its rows.
        index: int32 [n], the column of each row.
        value: float32 [n], or None.
    """

    def __init__(
        self, projection: IndexedProjection, ranges: Sequence[Range], index: Tensor, value: Tensor | None
    ) -> None:
        super().__init__(projection, index.device, ranges)
        self.index, self.value = index, value

    @property
    def nbytes(self) -> int:
        return super().nbytes + self.index.nbytes + (0 if self.value is None else self.value.nbytes)

    def columns(self) -> Tensor:
        return self.index

    def _vectors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        """(scale, index, value) for sums in `dtype`."""
        value = None if self.value is None else self.value.to(dtype)
        return self.projection.scale_on(self.device, dtype), self.index, value

    def operands(self, dtype: torch.dtype) -> tuple[Any, ...]:
        return *self._vectors(dtype), *(self.members() if self.by_members else ())

    def forward(self, theta_d: Tensor, trained: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return _called(operators.project.default, theta_d, *self._vectors(theta_d.dtype), dtype)

    def transpose(self, pieces: Sequence[Tensor], dtype: torch.dtype, at: Sequence[Tensor] = ()) -> Gradients:
        scale, index, value = self._vectors(dtype)
        if self.by_members:
            return (self._segment_sum(pieces, scale, value),)
        return (_called(operators.project_scatter.default, list(pieces), scale, index, value),)


class ComputedRows(IndexedRows):
    """Rows whose index is computed on the way, and not kept. On CUDA, the members of a column are computed where they
    have a closed form, else kept, 4 bytes a row.

    Args:
        projection: P.
        device: where the rows are.
        ranges: of P's rows.
    """

    projection: SeededProjection

    def __init__(self, projection: SeededProjection, device: torch.device, ranges: Sequence[Range]) -> None:
        super().__init__(projection, device, ranges)
        bounds = [bound for pair in ranges for bound in pair]
        self._source = projection.name, projection.version, projection.D, projection.seed, bounds

    def columns(self) -> Tensor:
        return torch.cat([self.projection.columns(start, stop, self.device) for start, stop in self.ranges])

    def operands(self, dtype: torch.dtype) -> tuple[Any, ...]:
        return self.projection.scale_on(self.device, dtype), *self._source

    def forward(self, theta_d: Tensor, trained: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return _called(operators.project_seeded.default, theta_d, *self.operands(theta_d.dtype), dtype)

    def transpose(self, pieces: Sequence[Tensor], dtype: torch.dtype, at: Sequence[Tensor] = ()) -> Gradients:
        if not self.by_members:
            return (_called(operators.project_seeded_scatter.default, list(pieces), *self.operands(dtype)),)
        if not self.projection.lists_members:
            return (self._segment_sum(pieces, self.projection.scale_on(self.device, dtype), None),)
        return (_called(operators.project_seeded_scatter.default, _few(pieces), *self.operands(dtype)),)


def _few(pieces: Sequence[Tensor]) -> list[Tensor]:
    """The pieces, or one of all of them where they are more than a kernel takes."""
    return list(pieces) if len(pieces) <= _MOST_PIECES else [_joined(pieces)]


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    return torch.cat([piece.flatten() for piece in pieces])


def _called(operator: torch._ops.OpOverload, *args: Any) -> Tensor:
    """The operator; without autograd's frame where nothing is differentiated, since that is half the cost of a small
    projection."""
    first = args[0] if isinstance(args[0], list) else args[:1]
    differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in first)
    if differentiated or forward_ad._current_level >= 0:
        return operator(*args)
    return below_autograd(operator, None, *args)


class _ProjectInGraph(torch.autograd.Function):
    """The operator ``project`` in a graph that is traced for CUDA, with the members of each column at hand: the
    derivative of the operator itself would sort them anew in every backward."""

    @staticmethod
    def forward(ctx, theta_d, scale, index, value, order, offsets, dtype):
        ctx.save_for_backward(scale, order, offsets, value)
        return operators.project(theta_d, scale, index, value, dtype)

    @staticmethod
    def backward(ctx, g_D):
        scale, order, offsets, value = ctx.saved_tensors
        return operators.project_segment_sum([g_D], scale, order, offsets, value), *[None] * 6
