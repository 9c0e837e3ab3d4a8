"""Projections whose theta_D lies in blocks, each computed by PyTorch from theta_d alone."""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from unilora_ext.functional import without_autocast
from unilora_ext.layout import Range
from unilora_ext.projections.base import Projection, faking, kept, ordinary
from unilora_ext.projections.restriction import Gradients, Restriction

__all__ = ["BlockProjection"]

_Operands = tuple[Any, ...]


class BlockProjection(Projection):
    """theta_D = [block_0, block_1, ...]: rows are computed by whole blocks, of which the asked ones are taken.

    Args:
        bounds: block k holds positions [bounds[k], bounds[k + 1]).
        d: length of theta_d.
        seed, version: see :class:`Projection`.
        given_options: see :class:`Projection`.
    """

    keeps = True
    """Whether what blocks are computed from is kept on a device."""

    def __init__(
        self,
        bounds: Sequence[int],
        d: int,
        seed: int = 0,
        version: int | None = None,
        given_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(bounds[-1], d, seed, version, given_options)
        self.bounds = tuple(bounds)
        self._kept: dict[tuple[int, torch.device, torch.dtype], _Operands] = {}

    def columns_of(self, block: int) -> Range:
        """The columns of P that a block reads: the others are 0 in its rows."""
        return 0, self.d

    def rows_of(self, block: int) -> tuple[tuple[int, int | None], ...]:
        """The rows [start, stop) of each trained part that a block reads; stop None: to the end."""
        return ((0, None),) * len(self.trained)

    @abstractmethod
    def block_operands(self, block: int, device: torch.device, dtype: torch.dtype) -> _Operands:
        """What :meth:`block` reads beside theta_d in `dtype`: tensors on `device`, and numbers."""

    @staticmethod
    @abstractmethod
    def block(theta_d: Tensor, trained: Sequence[Tensor], operands: _Operands) -> Tensor:
        """c + P theta_d of one block, of any shape, in the dtype of theta_d: plain operators.

        Args:
            theta_d: its columns alone, see :meth:`columns_of`.
            trained: P's trained parts, of each the rows of :meth:`rows_of`.
            operands: what :meth:`block_operands` gave.
        """

    block_transpose: Callable[[Tensor, _Operands], Tensor] | None = None
    """P^T g of one block, g [rows of the block] and the result [columns of the block]: plain operators. For a P without
    trained parts; None: by the derivative of :meth:`block`, which is computed anew for it."""

    def kept_operands(self, block: int, device: torch.device, dtype: torch.dtype) -> _Operands:
        """:meth:`block_operands`, kept."""
        if faking():
            with _disable_current_modes():
                real = ordinary(lambda: self.block_operands(block, torch.device("cpu"), dtype))
            return tuple(_like(operand, device) if isinstance(operand, Tensor) else operand for operand in real)
        if not self.keeps:
            return self.block_operands(block, device, dtype)
        if (key := (block, device, dtype)) not in self._kept:
            self._kept[key] = kept(device, lambda: self.block_operands(block, device, dtype))
        return self._kept[key]

    @classmethod
    def compute(cls, theta_d: Tensor, trained: Sequence[Tensor], operands: _Operands, dtype: torch.dtype) -> Tensor:
        with without_autocast(theta_d.device):
            parts = [
                cls.rows_of_block(theta_d[slice(*columns)], _rows(trained, rows), block, spans).to(dtype)
                for columns, rows, block, spans in operands
            ]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

    @classmethod
    def rows_of_block(
        cls, theta_d: Tensor, trained: Sequence[Tensor], operands: _Operands, spans: tuple[Range, ...]
    ) -> Tensor:
        """Rows `spans` of a block, one after the other."""
        rows = cls.block(theta_d, trained, operands).reshape(-1)
        if spans == ((0, len(rows)),):
            return rows
        return torch.cat([rows[start:stop] for start, stop in spans])

    def _restrict(self, device: torch.device, ranges: Sequence[Range]) -> Restriction:
        return _Blocks(self, device, ranges)

    def spans(self, ranges: Sequence[Range]) -> list[tuple[int, tuple[Range, ...]]]:
        """(block, rows of it) that make up `ranges`, in their order."""
        spans: list[tuple[int, tuple[Range, ...]]] = []
        for start, stop in ranges:
            while start < stop:
                block = bisect_right(self.bounds, start) - 1
                first, end = self.bounds[block], min(stop, self.bounds[block + 1])
                rows = ((start - first, end - first),)
                if spans and spans[-1][0] == block:
                    rows = spans.pop()[1] + rows
                spans.append((block, rows))
                start = end
        return spans

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_kept": {}}


class _Blocks(Restriction):
    """Rows that are taken from some blocks."""

    projection: BlockProjection

    def __init__(self, projection: BlockProjection, device: torch.device, ranges: Sequence[Range]) -> None:
        super().__init__(projection, device, ranges)
        self.spans = projection.spans(ranges)

    @property
    def nbytes(self) -> int:
        projection = self.projection
        if not projection.keeps:
            return 0
        kept = {block: projection.kept_operands(block, self.device, torch.float32) for block, _ in self.spans}
        tensors = [t for operands in kept.values() for t in operands if isinstance(t, Tensor)]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    def operands(self, dtype: torch.dtype) -> _Operands:
        return tuple(self._each(dtype))

    def _each(self, dtype: torch.dtype) -> Iterator[_Operands]:
        """(columns of theta_d, rows of the trained parts, operands, rows) of one block after the other: what is not
        kept is there one at a time."""
        projection = self.projection
        for block, spans in self.spans:
            operands = projection.kept_operands(block, self.device, dtype)
            yield projection.columns_of(block), projection.rows_of(block), operands, spans

    def forward(self, theta_d: Tensor, trained: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        compute = self.projection.compute
        return torch.cat([compute(theta_d, trained, (each,), dtype) for each in self._each(theta_d.dtype)])

    def transpose(self, pieces: Sequence[Tensor], dtype: torch.dtype, at: Sequence[Tensor] = ()) -> Gradients:
        g_D = (pieces[0] if len(pieces) == 1 else torch.cat([piece.reshape(-1) for piece in pieces])).reshape(-1)
        if self.projection.block_transpose is not None:
            with without_autocast(self.device):
                return (self._explicit(g_D.to(dtype)),)
        return self._by_derivative(g_D, dtype, at)

    def _explicit(self, g_D: Tensor) -> Tensor:
        g_d, start, bounds = g_D.new_zeros(self.projection.d), 0, self.projection.bounds
        for (block, _), (columns, _, operands, spans) in zip(self.spans, self._each(g_D.dtype), strict=True):
            length = bounds[block + 1] - bounds[block]
            if spans == ((0, length),):
                of_block, start = g_D[start : start + length], start + length
            else:
                of_block = g_D.new_zeros(length)
                for first, last in spans:
                    of_block[first:last] += g_D[start : start + last - first]
                    start += last - first
            g_d[slice(*columns)] += self.projection.block_transpose(of_block, operands)
        return g_d

    def _by_derivative(self, g_D: Tensor, dtype: torch.dtype, at: Sequence[Tensor]) -> Gradients:
        differentiable, start = torch.is_grad_enabled(), 0
        with torch.enable_grad(), without_autocast(self.device):
            theta_d, *trained = at or [torch.zeros(self.projection.d, dtype=dtype, device=self.device)]
            totals = [torch.zeros_like(t, requires_grad=False) for t in (theta_d, *trained)]
            for columns, rows, operands, spans in self._each(dtype):
                # Views, so that a graph of the gradient leads back to theta_d and the trained parts.
                own = [
                    t.view_as(t) if differentiable else t.detach()
                    for t in (theta_d[slice(*columns)], *_rows(trained, rows))
                ]
                own = [t if t.requires_grad else t.requires_grad_() for t in own]
                values = self.projection.rows_of_block(own[0], own[1:], operands, spans)
                grad, start = g_D[start : start + len(values)].to(values.dtype), start + len(values)
                found = torch.autograd.grad(
                    values, own, grad, create_graph=differentiable, allow_unused=True, materialize_grads=True
                )
                totals[0][slice(*columns)] += found[0]
                for total, span, g in zip(totals[1:], rows, found[1:], strict=True):
                    total[slice(*span)] += g
        return tuple(totals)


def _rows(trained: Sequence[Tensor], rows: Sequence[tuple[int, int | None]]) -> list[Tensor]:
    return [part[slice(*span)] for part, span in zip(trained, rows, strict=True)]


def _like(tensor: Tensor, device: torch.device) -> Tensor:
    """A fake of a tensor."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
