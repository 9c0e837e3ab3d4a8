"""vblora: sub-vectors that are mixtures of a bank of vectors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from unilora_ext.errors import UniLoRAError, shown
from unilora_ext.layout import Layout
from unilora_ext.projections.base import Given, Option
from unilora_ext.projections.blocks import BlockProjection

_Operands = tuple[int, ...]


class VBLoraProjection(BlockProjection):
    """VB-LoRA (Li et al., arXiv 2405.15179): theta_D is cut into sub-vectors of length b, each the
    mixture of K of the h vectors of a bank, with the softmax of the K largest of its h logits as weights. theta_d =
    vec_row(bank [h, b]); the logits [N, h] are a trained part, those of B [m / b, r] and then those of A [r, n / b]
    for each module in turn. As in PEFT, sub-vectors run down the columns of B and along the rows of A.

    Starts with a bank uniform in [-0.02, 0.02] (or the bound that is given) and logits of N(0, 0.01).

    With ``save_only_topk`` an adapter file has, instead of the logits, ``topk_indices`` [N, K] (uint8, int16 or int32,
    the smallest that holds h) and ``topk_weights`` [N, K - 1], the first K - 1 weights. The logits that are read from
    it are log(weight), and -inf elsewhere: training may go on, but with these K vectors alone.

    Args:
        layout: of theta_D.
        version: 1 or None.
        seed: kept in an adapter file as it is in the configuration; nothing is drawn from it.
        **options: see :attr:`Projection.options`.

    Raises:
        UniLoRAError: b does not divide all m and n, or K is more than h.
    """

    name = "vblora"
    trained = ("logits",)
    stored_names = ("logits", "topk_indices", "topk_weights")
    options: ClassVar[Mapping[str, Option]] = {
        "num_vectors": Option(256, "h, number of vectors of the bank", least=1),
        "vector_length": Option(
            None, "b, their length; None: the largest one <= 256 that divides all m and n", least=1
        ),
        "topk": Option(2, "K, number of vectors that are mixed", least=1),
        "save_only_topk": Option(False, "whether a file holds the K weights instead of all logits"),
    }
    learning_rates: ClassVar[Mapping[str, float]] = {"theta_d": 1e-3, "logits": 1e-2}

    def __init__(self, layout: Layout, version: int | None = None, seed: int = 0, **options: Any) -> None:
        options = self.checked_options(options)
        d, b = self.size(layout, options), self.length(layout, options)
        super().__init__(layout.starts, d, seed, version, options)
        self.layout, self.vector_length = layout, b

    @classmethod
    def length(cls, layout: Layout, options: Mapping[str, Any]) -> int:
        """b"""
        common, b = math.gcd(*(side for shape in layout.shapes for side in shape)), options["vector_length"]
        if b is None:
            return max(length for length in range(1, min(common, 256) + 1) if common % length == 0)
        if common % b:
            raise UniLoRAError(
                f"projection_options['vector_length']: expected a divisor of {common}, the largest one of all "
                f"m and n; got {b}"
            )
        return b

    @classmethod
    def size(cls, layout: Layout, options: Mapping[str, Any]) -> int:
        h, K = options["num_vectors"], options["topk"]
        if h < K:
            raise UniLoRAError(f"projection_options['topk']: expected at most num_vectors = {h}, got {K}")
        return h * cls.length(layout, options)

    @classmethod
    def of(cls, given: Given) -> VBLoraProjection:
        return cls(given.layout, given.version, given.seed, **given.options)

    def start(self, dtype: torch.dtype, bound: float | None = None) -> dict[str, Tensor]:
        shape = self.D // self.vector_length, self.given_options["num_vectors"]
        bank = super().start(dtype, 0.02 if bound is None else bound)
        return {**bank, "logits": torch.randn(shape, dtype=dtype, device="cpu") * 0.1}

    def rows_of(self, block: int) -> tuple[tuple[int, int]]:
        return (tuple(bound // self.vector_length for bound in self.bounds[block : block + 2]),)

    def block_operands(self, block: int, device: torch.device, dtype: torch.dtype) -> _Operands:
        return *self.layout.shapes[block], self.layout.r, self.vector_length, self.given_options["topk"]

    @staticmethod
    def block(theta_d: Tensor, trained: Sequence[Tensor], operands: _Operands) -> Tensor:
        m, _, r, b, K = operands
        of_B = m // b * r
        largest, vectors = trained[0].topk(K)
        # embedding: its derivative sums in a fixed order
        mixed = (largest.softmax(-1)[..., None] * F.embedding(vectors, theta_d.view(-1, b))).sum(-2)
        B = mixed[:of_B].view(m // b, r, b).transpose(1, 2)
        return torch.cat([B.reshape(-1), mixed[of_B:].reshape(-1)])

    def stored(self, trained: Mapping[str, Tensor], resumable: bool = False) -> dict[str, Tensor]:
        if resumable or not self.given_options["save_only_topk"]:
            return dict(trained)
        largest, vectors = trained["logits"].topk(self.given_options["topk"])
        return {"topk_indices": vectors.to(self._index_dtype), "topk_weights": largest.softmax(-1)[:, :-1]}

    def restored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self.given_options["save_only_topk"] or "logits" in tensors:
            return super().restored(tensors)
        h, K, N = *(self.given_options[name] for name in ("num_vectors", "topk")), self.D // self.vector_length
        expected = {"topk_indices": ([N, K], self._index_dtype), "topk_weights": ([N, K - 1], None)}
        got = {name: (list(t.shape), t.dtype) for name, t in tensors.items()}
        good = got.keys() == expected.keys() and all(got[name][0] == expected[name][0] for name in expected)
        good = good and got["topk_indices"][1] == self._index_dtype and tensors["topk_weights"].is_floating_point()
        if not good or not 0 <= int(tensors["topk_indices"].min()) <= int(tensors["topk_indices"].max()) < h:
            raise UniLoRAError(f"trained parts: expected {expected}, with indices below {h}; got {shown(got)}")
        weights = tensors["topk_weights"]
        weights = torch.cat([weights, (1 - weights.sum(-1, keepdim=True)).clamp_min(0)], dim=-1)
        logits = weights.new_full((N, h), -torch.inf)
        return {"logits": logits.scatter(1, tensors["topk_indices"].long(), weights.log())}

    @property
    def _index_dtype(self) -> torch.dtype:
        h = self.given_options["num_vectors"]
        return torch.uint8 if h <= 1 << 8 else torch.int16 if h <= 1 << 15 else torch.int32
