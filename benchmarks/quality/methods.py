"""How a model is adapted: each member of the family, PEFT's own code, or the head alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

from torch import Tensor, nn
from torch.nn import Parameter

import unilora_ext as ul
from unilora_ext.config import UniLoRAConfig

__all__ = ["METHODS", "START", "Adapted", "Method"]

PAPERS_RATIO = 17.1  # D / d of RoBERTa-large in the paper
START = 0.02 / sqrt(PAPERS_RATIO)
"""Bound of the entries of theta_D at the start in the paper's GLUE runs, where theta_d starts in [-0.02, 0.02]."""
FIRST = 64
"""d over the d that growing begins with."""


@dataclass(frozen=True)
class Adapted:
    """A model as it is trained.

    Attributes:
        model: with the adapter.
        groups: what is trained beside the head, with the rate of each as a multiple of the run's.
        D: numbers of theta_D; 0 where that does not apply.
        beside: how many more numbers than are trained a file keeps.
        adapter: where it is one of ours.
    """

    model: nn.Module
    groups: list[tuple[list[Parameter], float]]
    D: int
    beside: int
    adapter: ul.Adapter | None = None

    @property
    def numbers(self) -> int:
        """How many numbers are trained beside the head."""
        return sum(parameter.numel() for parameters, _ in self.groups for parameter in parameters)

    @property
    def stored(self) -> int:
        """Bytes of the adapter without the head, in float32, as a file keeps them."""
        return 4 * (self.numbers + self.beside)


@dataclass(frozen=True)
class Method:
    """A way of adapting a model.

    Attributes:
        label: in tables.
        centre: the middle of the learning rates that are tried; None: the task's rate of a LoRA matrix, times
            that factor where `law` says so.
        law: whether start and rate are a LoRA matrix's, times what P divides theta_d by: sqrt(D / d), or 1.
        r: usual rank.
        grows: whether theta_d is a 64th of d at first, and grows fourfold, its rate halved, where an epoch does not
            lower the validation loss.
        projection: a name of the family; None: `peft`.
        peft: class of a PEFT configuration.
        options: of the projection or of the PEFT configuration.
    """

    label: str
    centre: float | None = None
    law: bool = False
    r: int = 4
    grows: bool = False
    projection: str | None = None
    peft: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def adapt(self, model: nn.Module, task: Any, seed: int, r: int, d: int | None, start: float | None) -> Adapted:
        """Adapts `model` in place.

        Args:
            model: plain.
            task: whose layers are adapted.
            seed: of P.
            r: rank.
            d: length of theta_d; None: the method's own.
            start: bound of theta_d's start; None: the method's own.
        """
        if self.projection is not None:
            return self._ours(model, task, seed, r, d, start)
        if self.peft is not None:
            return self._pefts(model, task, r)
        model.requires_grad_(False)
        return Adapted(model, [], 0, 0)

    def _ours(self, model: nn.Module, task: Any, seed: int, r: int, d: int | None, start: float | None) -> Adapted:
        if self.grows:
            d, start = d // FIRST, start * sqrt(FIRST)
        config = UniLoRAConfig(
            r=r,
            d=d,
            seed=seed,
            init_bound=start,
            projection=self.projection or "",
            projection_options=self.options,
            target_modules=task.targets,
            modules_to_save=task.head,
        )
        adapter = ul.attach(model, config)
        rates = adapter.learning_rates()
        groups = [([parameter], rates[name] / rates["theta_d"]) for name, parameter in adapter.trained.items()]
        parts = {name: tensor for name, tensor in adapter.trained.items() if name != "theta_d"}
        beside = sum(t.numel() for t in adapter.projection.stored(parts).values()) - sum(
            map(Tensor.numel, parts.values())
        )
        return Adapted(model, groups, adapter.projection.D, beside, adapter)

    def _pefts(self, model: nn.Module, task: Any, r: int) -> Adapted:
        import peft

        given = {"target_modules": list(task.targets), "modules_to_save": list(task.head), **self.options}
        if self.peft in ("LoraConfig", "VBLoRAConfig", "UniLoraConfig"):
            given["r"] = r
        if self.peft == "LoraConfig":
            given["lora_alpha"] = r
        adapted = peft.get_peft_model(model, getattr(peft, self.peft)(**given))
        own = [(n, p) for n, p in adapted.named_parameters() if p.requires_grad and "modules_to_save" not in n]
        slow = [p for n, p in own if "logits" not in n]
        fast = [p for n, p in own if "logits" in n]  # VB-LoRA's, ten times the bank's rate as published
        groups = [(part, rate) for part, rate in ((slow, 1.0), (fast, 10.0)) if part]
        return Adapted(adapted, groups, 0, 0)


def _ours(
    projection: str, label: str, centre: float | None = None, law: bool = False, r: int = 4, **options: Any
) -> Method:
    return Method(label, centre, law, r, projection=projection, options=options)


def _pefts(kind: str, label: str, centre: float | None = None, **options: Any) -> Method:
    return Method(label, centre, peft=kind, options=options)


METHODS: dict[str, Method] = {
    "head": Method("the head alone", centre=1.0),
    "lora": _ours("identity", "LoRA"),
    "uniform": _ours("uniform", "Uni-LoRA", law=True),
    "growing": Method("Uni-LoRA, d grows", law=True, projection="uniform", grows=True),
    "balanced": _ours("balanced", "Uni-LoRA, balanced index", law=True),
    "unnormalised": _ours("uniform", "Uni-LoRA without 1/sqrt(n)", law=True, normalize=False),
    "countsketch": _ours("countsketch", "count sketch (random signs)", law=True),
    "local": _ours("local", "local P", law=True),
    "nonuniform": _ours("nonuniform", "non-uniform P", law=True),
    "fastfood": _ours("fastfood", "Fastfood, global", law=True),
    "gaussian": _ours("gaussian", "dense Gaussian", law=True),
    "vera": _ours("vera", "VeRA", centre=1e-2, r=256),
    "tied": _ours("tied", "Tied-LoRA", centre=3e-3),
    "vblora": _ours("vblora", "VB-LoRA", centre=3e-3),
    "vblora-small": _ours("vblora", "VB-LoRA, h = 3", centre=3e-3, num_vectors=3),
    "loraxs": _ours("loraxs", "LoRA-XS", centre=3e-3, r=16),
    "fourierft": _ours("fourierft", "FourierFT", centre=6e-2),
    "fourierft-small": _ours("fourierft", "FourierFT, n = 64", centre=6e-2, n_frequency=64),
    "tinylora": _ours("tinylora", "TinyLoRA", centre=1e-2, r=2),
    "tinylora-large": _ours("tinylora", "TinyLoRA, a v for each layer", centre=1e-2, r=2, groups=12),
    "peft-lora": _pefts("LoraConfig", "PEFT LoRA"),
    "peft-vera": _pefts("VeraConfig", "PEFT VeRA", centre=1e-2),
    "peft-vblora": _pefts("VBLoRAConfig", "PEFT VB-LoRA", centre=3e-3, vector_length=128),
    "peft-fourierft": _pefts("FourierFTConfig", "PEFT FourierFT", centre=6e-2),
}
