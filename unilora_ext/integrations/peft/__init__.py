"""PEFT: its UniLora models on this package's operators, its checkpoints in and out, and adapters as plain LoRA.

``accelerate``
    a PEFT UniLora model, in place.
``to_peft``, ``from_peft``
    PEFT's UniLora checkpoints and adapters of this package.
``from_lora``
    a LoRA of PEFT, projected to d numbers. (PEFT itself is not needed for this one, nor for the next.)
``export_lora``
    an adapter as plain LoRA matrices, for PEFT, vLLM and llama.cpp.
"""

from typing import Any

from unilora_ext.export import export_lora
from unilora_ext.integrations.peft.checkpoint import from_peft, need_peft, to_peft
from unilora_ext.integrations.peft.lora import from_lora

__all__ = ["accelerate", "accelerated_layers", "export_lora", "from_lora", "from_peft", "to_peft"]


def __getattr__(name: str) -> Any:
    if name in ("accelerate", "accelerated_layers"):  # subclasses of PEFT's classes: PEFT is imported with them
        need_peft()
        from unilora_ext.integrations.peft import acceleration

        return getattr(acceleration, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
