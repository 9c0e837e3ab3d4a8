"""Projections that are made from the singular vectors of the base weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from unilora_ext.errors import UniLoRAError
from unilora_ext.layout import Layout
from unilora_ext.projections.base import Weights, expect_tensors
from unilora_ext.projections.blocks import BlockProjection

__all__ = ["Basis", "SingularProjection"]

_TOLERANCE = 1e-2


class Basis(NamedTuple):
    """The r largest singular values of a weight and their vectors, on the CPU, float32 (float64 for a float64 weight):
    U [m, r], S [r], V [n, r]. The component of a column of U that is largest in magnitude is positive."""

    U: Tensor
    S: Tensor
    V: Tensor

    @classmethod
    def of(cls, weight: Tensor, r: int) -> Basis:
        """Of W [m, n], computed where it is, in float64.

        Raises:
            UniLoRAError: an element is not finite.
        """
        dtype, W = torch.promote_types(weight.dtype, torch.float32), weight.detach().double()
        if not W.isfinite().all():
            raise UniLoRAError(f"the base weight {list(W.shape)} has elements that are not finite, so it has no SVD")
        U, S, V = _largest(W, r) if len(W) <= W.shape[1] else _largest(W.T, r)[::-1]
        signs = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
        return cls(*(t.to("cpu", dtype).contiguous() for t in (U * signs, S, V * signs)))

    def check(self) -> Tensor:
        """float32 [2 r]: inner products of the columns of U and V with a fixed pattern."""
        patterns = (torch.cos(torch.arange(len(t), dtype=torch.float64, device="cpu")) for t in (self.U, self.V))
        return torch.cat([p @ t.double() for p, t in zip(patterns, (self.U, self.V), strict=True)]).float()


def _largest(W: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [m, r], S [r], V [n, r] of W [m, n], m <= n: by the eigenvectors of W W^T, at a quarter of the cost of the
    SVD. Squaring takes half of the digits from small singular values; those are left to the SVD."""
    squares, vectors = torch.linalg.eigh(W @ W.T)
    if squares[-r] > 1e-6 * squares[-1]:
        U = vectors[:, -r:].flip(1)
        V = W.T @ U
        S = V.norm(dim=0)
        return U, S, V / S
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :r], S[:r], Vh[:r].T


class SingularProjection(BlockProjection):
    """A block for each module, made from the SVD of its weight W, which is computed here and kept on the CPU.

    An adapter file also has ``basis_check`` [L, 2 r]: it is not loaded onto other weights. Singular vectors are what
    they are only up to the gaps between singular values: where two of the r largest ones (or the last of them and the
    next) are equal, or nearly, another library, device or number of threads may find others, and the file is refused
    there though the weights are the same.

    Args:
        layout: of theta_D.
        weights: the base weights.
        d, seed, version: see :class:`Projection`.
        given_options: see :class:`Projection`.

    Raises:
        UniLoRAError: r is larger than a side of a weight.
    """

    stored_names = ("basis_check",)
    bases: tuple[Basis, ...]
    learning_rates: ClassVar[Mapping[str, float]] = {"theta_d": 1e-3}

    def __init__(
        self, layout: Layout, weights: Weights, d: int, seed: int, version: int | None, given_options: Mapping[str, Any]
    ) -> None:
        self.check_rank(layout)
        super().__init__(layout.starts, d, seed, version, given_options)
        self.layout = layout
        with torch.inference_mode(False), torch.no_grad():
            self.bases = tuple(Basis.of(weights(module), layout.r) for module in range(len(layout)))

    @classmethod
    def check_rank(cls, layout: Layout) -> None:
        """Raises where the rank is larger than a side of a weight."""
        m, n = min(layout.shapes, key=min)
        if layout.r > min(m, n):
            raise UniLoRAError(
                f"r: expected at most {min(m, n)} for '{cls.name}', which takes r singular vectors of every weight, "
                f"one of which is [{m}, {n}]; got {layout.r}"
            )

    def stored(self, trained: Mapping[str, Tensor], resumable: bool = False) -> dict[str, Tensor]:
        return {"basis_check": torch.stack([basis.check() for basis in self.bases])}

    def restored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        name, found = "basis_check", self.stored({})["basis_check"]
        stored = expect_tensors(tensors, {name: list(found.shape)})[name].float()
        differences = (found - stored).abs()
        if not bool((differences <= _TOLERANCE).all()):  # not a number, too
            raise UniLoRAError(
                f"{name}: the base weights are not those that the adapter was trained on: their singular vectors "
                f"differ by {float(differences.nan_to_num(torch.inf).max()):.3g} (expected at most {_TOLERANCE})"
            )
        return {}
