"""``nn.Linear`` with an update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unilora_ext.config import UniLoRAConfig, make_projection
from unilora_ext.errors import UniLoRAError
from unilora_ext.functional import accumulator_dtype
from unilora_ext.fused import FusedLayer
from unilora_ext.layer import LayerState
from unilora_ext.layout import Layout
from unilora_ext.projections import Projection, projection_class
from unilora_ext.shared_vector import SharedVector
from unilora_ext.uncalled import keeps_called

__all__ = ["UniLoRALinear", "start_on"]


class UniLoRALinear(FusedLayer, nn.Linear):
    """A drop-in ``nn.Linear`` with a frozen weight and a Uni-LoRA update.

    Made by :func:`unilora_ext.attach` it shares the model's vector. Made by hand it has a vector of its own:

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``.
        r: rank.
        d: length of theta_d; None: :func:`default_d` of D = (in_features + out_features) r.
        projection: a name, as in :class:`~unilora_ext.UniLoRAConfig`, or a
            :class:`~unilora_ext.projections.Projection` of D rows.
        seed: of the projection.
        alpha: s = alpha / r; None: s = 1.
        dropout: on the LoRA path, in training.
        init_bound: theta_d starts uniform in [-init_bound, init_bound]; None: as the projection has it.
        projection_options: settings of the projection, see :class:`~unilora_ext.UniLoRAConfig`.

    Shape: x [..., in_features] -> y [..., out_features].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **lora: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._own_vector(**lora)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **lora: Any) -> UniLoRALinear:
        """The same layer around the weight and bias of `linear`, which are shared and frozen, not copied.

        Args:
            linear: an ``nn.Linear``.
            **lora: r, d, projection, seed, alpha, dropout, init_bound, projection_options, as in the constructor.
        """
        if type(linear) is not nn.Linear:
            raise UniLoRAError(f"from_linear: expected a torch.nn.Linear, got {type(linear).__name__}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.weight, layer.bias = linear.weight, linear.bias
        layer._own_vector(**lora)
        return layer.train(linear.training)

    def _own_vector(
        self,
        *,
        r: int = 4,
        d: int | None = None,
        projection: str | Projection = "uniform",
        seed: int = 0,
        alpha: float | None = None,
        dropout: float = 0.0,
        init_bound: float | None = None,
        projection_options: Mapping[str, Any] | None = None,
    ) -> None:
        given = isinstance(projection, Projection)
        config = UniLoRAConfig(
            r=r, d=d, seed=seed, alpha=alpha, dropout=dropout, init_bound=init_bound,
            projection="uniform" if given else projection, projection_options=projection_options or {},
        )  # fmt: skip
        layout = Layout(
            ((self.out_features, self.in_features),), r, (projection if given else projection_class(projection)).order
        )
        if not given:
            projection = make_projection(config, layout, weights=lambda _: self.weight)
        if layout.D != projection.D or d not in (None, projection.d):
            raise UniLoRAError(
                f"UniLoRALinear: projection: expected D = {layout.D} rows for this layer and rank "
                f"and d = {d or 'any'}, got {projection}"
            )
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.vector = SharedVector(
            start_on(projection, self.weight, init_bound), projection, layout, scaling=config.scaling
        )
        self._unilora = LayerState(self.vector, 0, config.dropout)
        self.register_forward_hook(keeps_called)

    @property
    def theta_d(self) -> nn.Parameter:
        """[d]: the trainable vector (of the whole model, for a layer made by ``attach``)."""
        return self._unilora.vector.theta_d

    @property
    def projection(self) -> Projection:
        """P, of the same vector."""
        return self._unilora.vector.projection


def start_on(projection: Projection, like: Tensor, bound: float | None) -> dict[str, Tensor]:
    """theta_d and the projection's trained parts as training begins, drawn by PyTorch's global CPU generator, on the
    device of `like` (the CPU for a meta tensor): float32, float64 for a float64 `like`."""
    start = projection.start(accumulator_dtype(like.dtype), bound)
    return start if like.is_meta else {name: tensor.to(like.device) for name, tensor in start.items()}
