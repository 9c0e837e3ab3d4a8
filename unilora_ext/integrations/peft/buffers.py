"""PEFT keeps an int64 index and a scale for every element of theta_D. Here both are computed where they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor

from unilora_ext.projections import Projection

__all__ = ["ComputedBuffers", "Segment"]


@dataclass(frozen=True)
class Segment:
    """One matrix's rows of P.

    Attributes:
        projection: P.
        start: the first of the rows.
        shape: of the matrix.
        what: ``"indices"`` (int64, the column of each element) or ``"scales"`` (float32, its 1 / sqrt(n_j)).
    """

    projection: Projection
    start: int
    shape: tuple[int, int]
    what: str

    def tensor(self, device: torch.device) -> Tensor:
        stop = self.start + self.shape[0] * self.shape[1]
        columns = self.projection.columns(self.start, stop, device).long().view(self.shape)
        if self.what == "indices":
            return columns
        return self.projection.scale_on(device, torch.float32)[columns]


class _Entries(MutableMapping):
    """``_buffers`` of a :class:`ComputedBuffers`: by adapter name, a stored tensor or a segment."""

    def __init__(self, stored: dict[str, Tensor], device: torch.device, on_change: Callable[[str], None]) -> None:
        self.stored, self.device, self.on_change = stored, device, on_change
        self.segments: dict[str, Segment] = {}

    def __getitem__(self, name: str) -> Tensor:
        segment = self.segments.get(name)
        return self.stored[name] if segment is None else segment.tensor(self.device)

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self.segments.pop(name, None)
        self.stored[name] = tensor
        self.on_change(name)

    def __delitem__(self, name: str) -> None:
        del (self.segments if name in self.segments else self.stored)[name]
        self.on_change(name)

    def __contains__(self, name: object) -> bool:
        return name in self.segments or name in self.stored

    def __iter__(self) -> Iterator[str]:
        return iter([*self.stored, *self.segments])

    def __len__(self) -> int:
        return len(self.stored) + len(self.segments)


class ComputedBuffers(BufferDict):
    """A PEFT ``BufferDict`` whose tensors are computed when they are read: the same keys, values and state dict.

    What is written (a new adapter, a loaded checkpoint) is stored, as PEFT does, and `on_change` is told the adapter;
    :meth:`compute` replaces it again. A tensor that was read is a copy: assign to change an entry.
    """

    _buffers: Any

    def take_over(self, device: torch.device, on_change: Callable[[str], None]) -> None:
        """Prepares a plain ``BufferDict`` whose class was changed to this one."""
        self._buffers = _Entries(self._buffers, device, on_change)

    def compute(self, name: str, segment: Segment) -> None:
        """From now on the entry is computed; nothing is stored for it."""
        self._buffers.stored.pop(name, None)
        self._buffers.segments[name] = segment

    def _store_all(self) -> None:
        for name in self._buffers.segments.copy():
            self._buffers[name] = self._buffers[name]

    def _apply(self, fn, recurse: bool = True):
        entries = self._buffers
        for name, tensor in entries.stored.items():
            entries.stored[name] = fn(tensor)
        entries.device = fn(torch.empty(0, dtype=torch.int64, device=entries.device)).device
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        if self.persistent:  # it copies into the buffers
            self._store_all()
        super()._load_from_state_dict(*args)
