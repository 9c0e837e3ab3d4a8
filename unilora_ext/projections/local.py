"""local: every module has columns of its own."""

from __future__ import annotations

from collections.abc import Sequence

from unilora_ext.errors import UniLoRAError
from unilora_ext.layout import Layout
from unilora_ext.projections.segmented import SegmentedProjection, Stretch


class LocalProjection(SegmentedProjection):
    """The local ablation of Uni-LoRA (arXiv 2506.00799): d shared out equally to the L modules, and the
    column of a row drawn among those of its module, module l having [floor(d l / L), floor(d (l + 1) / L))."""

    name = "local"

    @classmethod
    def _stretches(cls, layout: Layout, d: int) -> Sequence[Stretch]:
        L = len(layout)
        if d < L:
            raise UniLoRAError(f"d: expected at least {L} for '{cls.name}', a column for each module; got {d}")
        bounds = [d * module // L for module in range(L + 1)]
        return [Stretch(*layout.range_of(i), bounds[i], bounds[i + 1] - bounds[i]) for i in range(L)]
