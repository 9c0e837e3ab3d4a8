"""PEFT's own code as a rival: its layers and its model, imported, not rewritten."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import LoraConfig, UniLoraConfig, get_peft_model
from peft.tuners.unilora.layer import UniLoraLayer
from shapes import Model
from torch import Tensor, nn

import unilora_ext as ul


def layers_without_weights(model: Model) -> nn.Module:
    """The model's linear layers, their weights reserved and never touched: only the shapes matter here."""
    with torch.device("meta"):
        layers = nn.ModuleList(nn.Linear(n, m, bias=False) for m, n in model.modules)
    return nn.ModuleDict({"linear": layers.to_empty(device="cpu")})


def peft_factors(model: Model) -> tuple[Tensor, Callable[[], list[Tensor]], int]:
    """PEFT's UniLora on the layers of `model`: theta_d, a function that rebuilds all A and B, bytes of its buffers."""
    names = [f"linear.{i}" for i in range(len(model.modules))]
    config = UniLoraConfig(r=model.r, theta_d_length=model.d, target_modules=names)
    peft_model = get_peft_model(layers_without_weights(model), config)
    layers = [module for module in peft_model.modules() if isinstance(module, UniLoraLayer)]
    buffers = [b for layer in layers for name, b in layer.named_buffers() if "indices" in name or "scales" in name]
    theta_d = next(p for name, p in peft_model.named_parameters() if "unilora_theta_d" in name)

    def rebuild() -> list[Tensor]:
        return [factor for layer in layers for factor in layer._get_lora_matrices("default")]

    return theta_d, rebuild, sum(b.nbytes for b in buffers)


def adapted(kind: str, make: Callable[[], nn.Module], targets: list[str], r: int, d: int) -> nn.Module:
    """A model from `make` with one way of adapting its `targets`: frozen, unilora_ext, peft-unilora or peft-lora."""
    torch.manual_seed(0)
    model = make()
    if kind == "frozen":
        return model.requires_grad_(False)
    if kind == "unilora_ext":
        ul.attach(model, ul.UniLoRAConfig(r=r, d=d, target_modules=targets))
        return model
    if kind == "peft-unilora":
        return get_peft_model(model, UniLoraConfig(r=r, theta_d_length=d, target_modules=targets))
    return get_peft_model(model, LoraConfig(r=r, lora_alpha=r, target_modules=targets))
