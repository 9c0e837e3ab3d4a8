"""Uni-LoRA (arXiv 2506.00799): all LoRA matrices of a model, rebuilt from one trainable vector.

    theta_D = P theta_d        P fixed, random, one non-zero in a row, P^T P = I

>>> import unilora_ext as ul
>>> adapter = ul.attach(model, ul.UniLoRAConfig(r=4, target_modules=["query", "value"]))
>>> optimizer = torch.optim.AdamW([adapter.theta_d], lr=5e-3)
>>> adapter.save("adapter")

Names are imported when they are first used, so that ``unilora --help`` need not wait for PyTorch. The operators
``torch.ops.unilora`` are registered by ``import unilora_ext`` where torch has been imported before it, and else by the
first name used. Who calls them by themselves in a program that imports torch later writes
``import unilora_ext.functional``.
"""

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

from unilora_ext.family import FAMILY

if TYPE_CHECKING:
    from unilora_ext import distributed, integrations
    from unilora_ext._native import _C as _C
    from unilora_ext._native import __version__
    from unilora_ext.adapter import Adapter, get_adapter
    from unilora_ext.attaching import attach
    from unilora_ext.checkpoint import AdapterFile, read
    from unilora_ext.config import UniLoRAConfig, default_d
    from unilora_ext.errors import AdapterFileError, AttachError, UniLoRAError
    from unilora_ext.functional import lora_linear
    from unilora_ext.integrations.peft.lora import from_lora
    from unilora_ext.linear import UniLoRALinear
    from unilora_ext.loading import load
    from unilora_ext.projections import OneHotProjection, Projection
    from unilora_ext.shared_vector import SharedVector

__all__ = [
    "Adapter",
    "AdapterFile",
    "AdapterFileError",
    "AttachError",
    "OneHotProjection",
    "Projection",
    "SharedVector",
    "UniLoRAConfig",
    "UniLoRAError",
    "UniLoRALinear",
    "__version__",
    "attach",
    "default_d",
    "distributed",
    "from_lora",
    "get_adapter",
    "integrations",
    "load",
    "lora_linear",
    "read",
]
__all__ += [*FAMILY.values()]

_NAMES = {
    "_native": ("_C", "__version__"),
    "adapter": ("Adapter", "get_adapter"),
    "attaching": ("attach",),
    "checkpoint": ("AdapterFile", "read"),
    "config": ("UniLoRAConfig", "default_d"),
    "errors": ("AdapterFileError", "AttachError", "UniLoRAError"),
    "integrations.peft.lora": ("from_lora",),
    "linear": ("UniLoRALinear",),
    "functional": ("lora_linear",),
    "loading": ("load",),
    "projections": ("OneHotProjection", "Projection", *FAMILY.values()),
    "shared_vector": ("SharedVector",),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
"""The module of each name; any other name is a module of its own."""


def __getattr__(name: str) -> Any:
    module = f"{__name__}.{_MODULE_OF.get(name, name)}"
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(module), name)
    elif not name.startswith("__") and importlib.util.find_spec(module) is not None:
        value = importlib.import_module(module)
    else:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    globals()[name] = value  # the next use is an ordinary look-up
    _register_operators()
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register_operators() -> None:
    if "torch" in sys.modules:
        importlib.import_module("unilora_ext.functional")


_register_operators()
