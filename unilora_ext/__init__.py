"""Uni-LoRA (arXiv 2506.00799): all LoRA matrices of a model, rebuilt from one trainable vector.

    theta_D = P theta_d        P fixed, random, one non-zero in a row, P^T P = I

>>> import unilora_ext as ul
>>> adapter = ul.attach(model, ul.UniLoRAConfig(r=4, target_modules=["query", "value"]))
>>> optimizer = torch.optim.AdamW([adapter.theta_d], lr=5e-3)
>>> adapter.save("adapter")
"""

from unilora_ext import distributed, integrations
from unilora_ext._native import _C
from unilora_ext.adapter import Adapter, attach, get_adapter
from unilora_ext.checkpoint import AdapterFile, load, read
from unilora_ext.config import UniLoRAConfig, default_d
from unilora_ext.errors import AdapterFileError, AttachError, UniLoRAError
from unilora_ext.linear import UniLoRALinear
from unilora_ext.ops import lora_linear
from unilora_ext.projections import BalancedProjection, OneHotProjection, PeftProjection, Projection, UniformProjection
from unilora_ext.shared_vector import SharedVector

__all__ = [
    "Adapter",
    "AdapterFile",
    "AdapterFileError",
    "AttachError",
    "BalancedProjection",
    "OneHotProjection",
    "PeftProjection",
    "Projection",
    "SharedVector",
    "UniLoRAConfig",
    "UniLoRAError",
    "UniLoRALinear",
    "UniformProjection",
    "__version__",
    "attach",
    "default_d",
    "distributed",
    "get_adapter",
    "integrations",
    "load",
    "lora_linear",
    "read",
]

__version__: str = _C.version
