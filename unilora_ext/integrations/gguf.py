"""llama.cpp's LoRA files: the update of a decoder, for ``llama-cli --lora``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from unilora_ext.adapter import Adapter
from unilora_ext.errors import UniLoRAError
from unilora_ext.functional import accumulator_dtype

__all__ = ["export_gguf"]


@dataclass(frozen=True)
class _Family:
    """How llama.cpp keeps a Transformers model type.

    Attributes:
        arch: name of the ``gguf.MODEL_ARCH``.
        interleaved: whether the rows of q and k in a head are paired for its rotary embedding, (0, h/2, 1, h/2 + 1,
            ...), where Transformers has the halves one after the other.
    """

    arch: str
    interleaved: bool


_FAMILIES = {
    "llama": _Family("LLAMA", interleaved=True),
    "mistral": _Family("LLAMA", interleaved=True),
    "qwen2": _Family("QWEN2", interleaved=False),
    "qwen3": _Family("QWEN3", interleaved=False),
}


def export_gguf(adapter: Adapter, path: str | Path) -> None:
    """Writes the update as a GGUF LoRA file, exact: ``<tensor>.weight.lora_a`` [r, n] and ``.lora_b`` [m, r], float32,
    and ``adapter.lora.alpha`` = scaling r. Needs the package ``gguf``.

    Args:
        adapter: attached to a Transformers causal language model of type llama, mistral, qwen2 or qwen3.
        path: of the file; one that is there is replaced in one step.

    Raises:
        UniLoRAError: another kind of model, a layer that llama.cpp's model lacks, modules_to_save (the format has no
            place for them), or scaling 0 (llama.cpp reads it as 1). Nothing is written.
    """
    import gguf

    config, model_config = adapter.config, getattr(adapter.model, "config", None)
    kind = getattr(model_config, "model_type", None)
    if kind not in _FAMILIES:
        raise UniLoRAError(f"export_gguf: model: expected a model of type {sorted(_FAMILIES)}, got {kind!r}")
    if config.modules_to_save:
        raise UniLoRAError(f"export_gguf: modules_to_save: expected none, got {list(config.modules_to_save)}")
    if config.scaling == 0:
        raise UniLoRAError("export_gguf: scaling: expected a number other than 0, got 0")
    family = _FAMILIES[kind]
    arch = gguf.MODEL_ARCH[family.arch]
    names = gguf.get_tensor_name_map(arch, model_config.num_hidden_layers)
    heads = {"q_proj": model_config.num_attention_heads, "k_proj": model_config.num_key_value_heads}

    tensors: dict[str, Tensor] = {}
    for name, layer in adapter.layers.items():
        target = names.get_name(name)
        if target is None or not layer.is_linear:
            raise UniLoRAError(
                f"export_gguf: '{name}': expected a layer that llama.cpp's {kind} has and adapts, got none"
            )
        with torch.no_grad():
            A, B = layer.lora_factors(accumulator_dtype(layer.update_like()[1]))
        ending = name.rpartition(".")[2]
        if family.interleaved and ending in heads:
            B = _interleave(B, heads[ending])
        tensors[target + ".weight.lora_a"], tensors[target + ".weight.lora_b"] = A, B

    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[arch])
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, config.r if config.alpha is None else config.alpha)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.float().cpu().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _interleave(B: Tensor, heads: int) -> Tensor:
    """Rows of each head, two halves one after the other, to pairs: B [m, r]."""
    return B.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(B.shape)
