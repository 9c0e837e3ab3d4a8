"""fourierft: a few coefficients of the spectrum of dW."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from unilora_ext.errors import UniLoRAError
from unilora_ext.layout import Layout, Order, Range
from unilora_ext.projections.base import Given, Option
from unilora_ext.projections.blocks import BlockProjection
from unilora_ext.projections.draws import Draws, Purpose

_Operands = tuple[Tensor, Tensor, Tensor, int, int, float]


class FourierFTProjection(BlockProjection):
    """FourierFT (Gao et al., arXiv 2405.03003, equations 2-4): dW = scale Re(ifft2(F)), F [m, n] with k coefficients
    from theta_d at random places, 0 elsewhere. theta_d holds the coefficients of each module in turn.

    Starts with coefficients of N(0, 1), as PEFT by default: the update of an untrained adapter is not 0.

    Args:
        layout: of theta_D, in the order DENSE.
        seed: of the places.
        version: 1 or None.
        **options: see :attr:`Projection.options`.

    Raises:
        UniLoRAError: more coefficients than a weight has elements.
    """

    name = "fourierft"
    order = Order.DENSE
    options: ClassVar[Mapping[str, Option]] = {
        "n_frequency": Option(1000, "number of coefficients of each module, at most m n", least=1),
        "scale": Option(150.0, "what the inverse transform is multiplied by"),
    }
    learning_rates: ClassVar[Mapping[str, float]] = {"theta_d": 6e-2}

    def __init__(self, layout: Layout, seed: int = 0, version: int | None = None, **options: Any) -> None:
        size = self.size(layout, self.checked_options(options))
        super().__init__(layout.starts, size, seed, version, options)
        self.layout = layout

    @classmethod
    def size(cls, layout: Layout, options: Mapping[str, Any]) -> int:
        count, (m, n) = options["n_frequency"], min(layout.shapes, key=lambda shape: shape[0] * shape[1])
        if count > m * n:
            raise UniLoRAError(
                f"projection_options['n_frequency']: expected at most {m * n}, the elements of the smallest weight "
                f"[{m}, {n}]; got {count}"
            )
        return count * len(layout)

    @classmethod
    def of(cls, given: Given) -> FourierFTProjection:
        return cls(given.layout, given.seed, given.version, **given.options)

    def start(self, dtype: torch.dtype, bound: float | None = None) -> dict[str, Tensor]:
        self._no_bound(bound)
        return {"theta_d": torch.randn(self.d, dtype=dtype, device="cpu")}

    def columns_of(self, block: int) -> Range:
        count = self.given_options["n_frequency"]
        return block * count, (block + 1) * count

    def places(self, module: int) -> Tensor:
        """int64 [k]: where the coefficients of a module are in vec_row(F)."""
        m, n = self.layout.shapes[module]
        draws = Draws(self.seed, Purpose.FOURIERFT, module)
        return torch.from_numpy(draws.distinct(self.given_options["n_frequency"], m * n))

    def block_operands(self, block: int, device: torch.device, dtype: torch.dtype) -> _Operands:
        """Re(ifft2(F)) is the inverse of F's Hermitian part, of which columns 0 to n // 2 are enough: half of each
        coefficient at its place, half at the mirrored one, as far as they are there."""
        (m, n), scale, places = self.layout.shapes[block], self.given_options["scale"], self.places(block)
        row, column = places // n, places % n
        rows, columns = torch.stack([row, -row % m]), torch.stack([column, -column % n])
        there, halves = columns <= n // 2, rows * (n // 2 + 1) + columns
        sources = torch.arange(len(places), device="cpu").expand(2, -1)
        indices = halves[there], sources[there], torch.where(there[0], *halves)
        return *(index.to(device) for index in indices), m, n, float(scale)

    @staticmethod
    def block(theta_d: Tensor, trained: Sequence[Tensor], operands: _Operands) -> Tensor:
        places, sources, _, m, n, scale = operands
        width = n // 2 + 1
        # At most two numbers meet at a place: their sum does not depend on an order.
        spectrum = theta_d.new_zeros(m * width).scatter_add(0, places, theta_d[sources] * (scale / 2))
        spectrum = torch.complex(spectrum, torch.zeros_like(spectrum)).view(m, width)
        return torch.fft.irfft2(spectrum, s=(m, n))

    @staticmethod
    def block_transpose(g: Tensor, operands: _Operands) -> Tensor:
        _, _, places, m, n, scale = operands
        return torch.fft.rfft2(g.view(m, n)).real.reshape(-1)[places] * (scale / (m * n))
