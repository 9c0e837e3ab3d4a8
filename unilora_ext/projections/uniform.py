"""uniform: the paper's P, each row's column drawn independently."""

import torch
from torch import Tensor

from unilora_ext.projections.indexed import SeededProjection


class UniformProjection(SeededProjection):
    """P of Uni-LoRA (arXiv 2506.00799, section 3.2): every row's column is drawn uniformly and independently.

    Counter-based (Philox4x32-10): the same seed gives the same P on every device, thread count and platform.
    """

    name = "uniform"

    def parents(self, d: int) -> Tensor:
        split = self._split(d)  # floor(floor(u d / 2^64) / split) = floor(u self.d / 2^64)
        return torch.arange(d, device="cpu") // split
