"""nonuniform: the Bs and the As have columns of their own."""

from __future__ import annotations

from collections.abc import Sequence

from unilora_ext.errors import UniLoRAError
from unilora_ext.layout import Layout
from unilora_ext.projections.segmented import SegmentedProjection, Stretch


class NonuniformProjection(SegmentedProjection):
    """The non-uniform ablation of Uni-LoRA (arXiv 2506.00799): the rows of all B in the first
    round(2 d / 3) columns, those of all A in the others."""

    name = "nonuniform"

    @classmethod
    def _stretches(cls, layout: Layout, d: int) -> Sequence[Stretch]:
        if d < 2:
            raise UniLoRAError(f"d: expected at least 2 for '{cls.name}', a column for B and one for A; got {d}")
        of_B = (2 * d + 1) // 3
        return sorted(
            stretch
            for module in range(len(layout))
            for stretch in (
                Stretch(*layout.range_of_B(module), 0, of_B),
                Stretch(*layout.range_of_A(module), of_B, d - of_B),
            )
        )
