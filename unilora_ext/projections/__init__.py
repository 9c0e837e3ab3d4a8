"""The projections theta_D = c + P theta_d, by the name that a configuration and an adapter file give them.

The classes of :data:`~unilora_ext.family.FAMILY` are imported when they are first used.
"""

import importlib
from typing import Any

from unilora_ext.errors import UniLoRAError, shown
from unilora_ext.family import FAMILY
from unilora_ext.projections.base import Given, Option, Projection
from unilora_ext.projections.one_hot import OneHotProjection
from unilora_ext.projections.restriction import Restriction

__all__ = [
    *FAMILY.values(),
    "Given",
    "OneHotProjection",
    "Option",
    "Projection",
    "Restriction",
    "projection_class",
]


def projection_class(name: str) -> type[Projection]:
    """The class of a projection's name.

    Raises:
        UniLoRAError: no such projection.
    """
    if name not in FAMILY:
        raise UniLoRAError(f"projection: expected one of {list(FAMILY)}, got {shown(name)}")
    return getattr(importlib.import_module(f"{__name__}.{name}"), FAMILY[name])


_NAME_OF = {cls: name for name, cls in FAMILY.items()}


def __getattr__(name: str) -> Any:
    if name in _NAME_OF:
        return projection_class(_NAME_OF[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
