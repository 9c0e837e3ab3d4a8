"""balanced: every column is used floor(D / d) or ceil(D / d) times."""

import torch
from torch import Tensor

from unilora_ext.projections.indexed import SeededProjection


class BalancedProjection(SeededProjection):
    """A keyed random permutation of the rows, dealt to the columns in turn: every column has floor(D / d) or
    ceil(D / d) members, so n_j is known in closed form.

    The permutation is a Feistel network (Mitchell et al., arXiv 2106.06161, use one in the same way), so that a
    position's column is computed by itself, with no stored list. Such a network is far from every permutation of few
    rows: version 2 orders D <= 256 of them by random numbers instead.
    """

    name = "balanced"
    versions = (1, 2)
    lists_members = True

    @property
    def counts(self) -> Tensor:
        column = torch.arange(self.d, dtype=torch.int32, device="cpu")
        return (column < self.D % self.d).int() + self.D // self.d

    def parents(self, d: int) -> Tensor:
        self._split(d)  # (element mod d) mod self.d = element mod self.d
        return torch.arange(d, device="cpu") % self.d
