"""The projections theta_D = P theta_d, by the name that a configuration and an adapter file give them."""

from unilora_ext.errors import UniLoRAError, shown
from unilora_ext.projections.balanced import BalancedProjection
from unilora_ext.projections.base import Projection, SeededProjection
from unilora_ext.projections.onehot import OneHotProjection
from unilora_ext.projections.peft import PeftProjection
from unilora_ext.projections.rows import Rows
from unilora_ext.projections.uniform import UniformProjection

__all__ = [
    "BalancedProjection",
    "OneHotProjection",
    "PeftProjection",
    "Projection",
    "Rows",
    "UniformProjection",
    "make_projection",
    "projection_class",
]

_BY_NAME: dict[str, type[SeededProjection]] = {
    cls.name: cls for cls in (UniformProjection, BalancedProjection, PeftProjection)
}


def projection_class(name: str) -> type[SeededProjection]:
    """The class of a projection's name.

    Raises:
        UniLoRAError: no such projection.
    """
    if name not in _BY_NAME:
        raise UniLoRAError(f"projection: expected one of {sorted(_BY_NAME)}, got {shown(name)}")
    return _BY_NAME[name]


def make_projection(
    name: str, D: int, d: int, seed: int, materialize: bool | None = None, version: int | None = None
) -> SeededProjection:
    """P [D, d] by name, version (None: the newest) and seed."""
    return projection_class(name)(D, d, seed=seed, materialize=materialize, version=version)
