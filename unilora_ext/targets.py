"""Which layers of a model are adapted."""

from __future__ import annotations

import difflib
import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from unilora_ext.convolution import UniLoRAConv1d, UniLoRAConv2d, UniLoRAConv3d
from unilora_ext.embedding import UniLoRAEmbedding
from unilora_ext.embedding import problem_of as problem_of_embedding
from unilora_ext.errors import AttachError, shown
from unilora_ext.experts import adapted_experts, stacks_experts
from unilora_ext.experts import problem_of as problem_of_experts
from unilora_ext.experts import shape_of as shape_of_experts
from unilora_ext.fused import FusedLayer
from unilora_ext.layer import UniLoRALayer, updated_class
from unilora_ext.linear import UniLoRALinear
from unilora_ext.sharded_tensors import is_sharded, managed_by_fsdp
from unilora_ext.uncalled import extends_forward, mentions_weight, reads_weight

__all__ = ["Target", "find_modules", "find_targets"]

logger = logging.getLogger("unilora_ext")


@dataclass(frozen=True)
class Target:
    """A layer that will be adapted: W, as a matrix, is [m, n]."""

    name: str
    module: nn.Module
    adapted_class: type[UniLoRALayer]
    m: int
    n: int

    def like(self) -> Tensor:
        """A tensor of the layer, on whose device it computes."""
        return next(chain(self.module.parameters(), self.module.buffers()), torch.empty(0, device="cpu"))


def find_targets(
    model: nn.Module,
    target_modules: Sequence[str] | str,
    modules_to_save: Sequence[str],
    whole_names: Sequence[str] | None = None,
) -> list[Target]:
    """The targets in ``named_modules()`` order.

    Args:
        model: the model to adapt.
        target_modules: as in :class:`~unilora_ext.UniLoRAConfig`.
        modules_to_save: modules trained whole; nothing inside them is adapted.
        whole_names: where they are known, the names of the targets; `target_modules` is then not looked at.

    Raises:
        AttachError: nothing matches, a matching module cannot be adapted, or a part of the model has an adapter or is
            not initialised; the message names it.
    """
    _check_ready(model)
    whole = [module for _, module in find_modules(model, modules_to_save, "modules_to_save")]
    inside_whole = {id(part) for module in whole for part in module.modules()}
    if whole_names is not None:
        chosen = set(whole_names)
        names = [name for name, _ in model.named_modules() if name in chosen]
        wanted = f"modules named {shown(list(whole_names))}"
    elif target_modules == "all-linear":
        names = _all_linear_names(model, inside_whole)
        _warn_of_stacks(model)
        wanted = "any linear layer (target_modules='all-linear')"
    elif isinstance(target_modules, str):
        names = [name for name, _ in model.named_modules() if name and re.fullmatch(target_modules, name)]
        wanted = f"a module whose whole name matches {target_modules!r}"
    else:
        names = [name for name, _ in find_modules(model, target_modules, "target_modules")]
        wanted = f"a module named {list(target_modules)}"
    if not names:
        raise AttachError(f"target_modules: expected {wanted}, {type(model).__name__} has {_linear_endings(model)}")

    modules = dict(model.named_modules())
    targets = []
    for name in names:
        module = modules[name]
        if id(module) in inside_whole:
            raise AttachError(
                f"target_modules: '{name}' is also in modules_to_save {list(modules_to_save)}: choose one"
            )
        adapted_class = _adapted_class(name, module, modules)
        if stacks_experts(module):
            m, n = shape_of_experts(module)
        else:
            m, n = _features(module) or adapted_class.as_matrix(module.weight).shape
        targets.append(Target(name, module, adapted_class, m, n))
    return targets


def _check_ready(model: nn.Module) -> None:
    """Whether all of the model can be frozen: an adapter inside it would be, too."""
    for name, module in model.named_modules():
        if isinstance(module, UniLoRALayer):
            raise AttachError(
                f"attach: '{name}' ({type(module).__name__}) in this {type(model).__name__} has a Uni-LoRA adapter "
                "already; detach it first"
            )
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise AttachError(
                f"attach: '{name}' is not initialised: call the model once before, so that its lazy layers get their "
                "shapes"
            )


def find_modules(model: nn.Module, endings: Sequence[str], field: str) -> list[tuple[str, nn.Module]]:
    """Modules whose name is one of `endings` or ends in ``.<ending>``, in ``named_modules()`` order.

    Raises:
        AttachError: an ending that no module has.
    """
    named = [(name, module) for name, module in model.named_modules() if name]

    def matches(name: str, ending: str) -> bool:
        return name == ending or name.endswith("." + ending)

    for ending in endings:
        if not any(matches(name, ending) for name, _ in named):
            close = difflib.get_close_matches(ending, sorted({name.rpartition(".")[2] for name, _ in named}), n=3)
            hint = f"; close names: {close}" if close else ""
            raise AttachError(
                f"{field}: no module of {type(model).__name__} is named '{ending}' or ends in '.{ending}'; "
                f"it has {_linear_endings(model)}{hint}"
            )
    return [(name, module) for name, module in named if any(matches(name, ending) for ending in endings)]


def _all_linear_names(model: nn.Module, inside_whole: set[int]) -> list[str]:
    """Every Linear and Conv1D but those whose parent reads their weight, and the output head: in a Transformers model
    with a head, all that lies outside its ``base_model``. A plain module has no telling head: there, name it in
    modules_to_save.

    Raises:
        AttachError: some of them are parts of PEFT's adapters, such as LoRA's A and B.
    """
    peft = sys.modules.get("peft.tuners.tuners_utils")
    base = getattr(model, "base_model", model)
    body = {id(part) for part in base.modules()} if isinstance(base, nn.Module) else None
    head = model.get_output_embeddings() if callable(getattr(model, "get_output_embeddings", None)) else None
    names = []
    for name, module in model.named_modules():
        if peft is not None and isinstance(module, peft.BaseTunerLayer):
            kind = f"{type(module).__module__}.{type(module).__name__}"
            raise AttachError(
                f"target_modules='all-linear': '{name}' has an adapter of PEFT ({kind}), whose own matrices are linear "
                "layers too: merge_and_unload() it first, or list the modules to adapt"
            )
        left_out = id(module) in inside_whole or module is head or (body is not None and id(module) not in body)
        above, _, child = name.rpartition(".")
        if _is_linear(module) and name and not left_out and reads_weight(model.get_submodule(above), child) is None:
            names.append(name)
    return names


_STACKS_WORTH_A_WARNING = 0.05
"""Of the model's parameters."""


def _warn_of_stacks(model: nn.Module) -> None:
    """Says what "all-linear" leaves out where that is much: parameters of three or more dimensions that no layer here
    knows, such as the matrices of all experts in one."""
    known = {id(p) for m in model.modules() if _plain_class(m) or _is_linear(m) for p in m.parameters(recurse=False)}
    stacks = {n: p for n, p in model.named_parameters() if p.dim() >= 3 and id(p) not in known}
    part, whole = (sum(p.numel() for p in parameters) for parameters in (stacks.values(), model.parameters()))
    if part <= _STACKS_WORTH_A_WARNING * whole:
        return
    experts = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if stacks_experts(m)})
    endings = sorted({".".join(name.split(".")[-2:]) for name in stacks})
    logger.warning(
        "target_modules='all-linear' leaves out %.0f %% of the model's weights, which stay frozen: stacked matrices "
        "that are no linear layers, as those of experts are (%s)%s",
        100 * part / whole,
        ", ".join(endings[:10]) + (", ..." if len(endings) > 10 else ""),
        f". To adapt them, list the layers in target_modules, {experts} among them" if experts else "",
    )


def _features(module: nn.Module) -> tuple[int, int] | None:
    """(m, n) of a linear map that states them, under the names in use; None if it does not."""
    for inputs, outputs in (("in_features", "out_features"), ("infeatures", "outfeatures")):
        n, m = getattr(module, inputs, None), getattr(module, outputs, None)
        if isinstance(n, int) and isinstance(m, int) and n > 0 and m > 0:
            return m, n
    return None


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is one linear map: of known kind, or stating its features with no such module inside."""
    if isinstance(module, nn.Linear) or _is_conv1d(module):
        return True
    called = (part for name, part in module.named_modules() if name and reads_weight(module, name) is None)
    return _features(module) is not None and not any(map(_features, called))


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is what it seems: not a quantised or sharded one that imitates a floating tensor."""
    return type(tensor) in (Tensor, nn.Parameter) or isinstance(tensor, FakeTensor)


def _is_conv1d(module: nn.Module) -> bool:
    transformers = sys.modules.get("transformers.pytorch_utils")
    return transformers is not None and type(module) is transformers.Conv1D


def _read_by(name: str, modules: dict[str, nn.Module]) -> str | None:
    """The class that reads the weight of the module `name` instead of calling it, or besides."""
    above, _, child = name.rpartition(".")
    reader = reads_weight(modules.get(above), child)
    if reader or _is_linear(modules[name]):
        return reader
    parts = name.split(".")
    levels = (modules[".".join(parts[:i])] for i in range(len(parts)))
    return next(filter(None, (mentions_weight(m, ".".join(parts[i:])) for i, m in enumerate(levels))), None)


def _adapted_class(name: str, module: nn.Module, modules: dict[str, nn.Module]) -> type[UniLoRALayer]:
    """The class that adapts `module`; an error that names the module where none does."""

    def refuse(reason: str) -> AttachError:
        return AttachError(f"target_modules: '{name}' ({type(module).__name__}) cannot be adapted: {reason}")

    reader = _read_by(name, modules)
    if reader is not None:
        raise refuse(f"{reader} reads its weight instead of calling it, so an update would have no effect")
    experts, plain = stacks_experts(module), _plain_class(module)
    if plain is None and not experts and not (_is_linear(module) and _features(module)):
        raise refuse(
            "expected a torch.nn.Linear, Embedding, Conv1d, Conv2d or Conv3d (not a subclass with another forward), a "
            "Conv1D or stacked experts of Transformers, or another linear layer with in_features and out_features (a "
            "quantised one)"
        )
    if isinstance(module, nn.Embedding) and (problem := problem_of_embedding(module)):
        raise refuse(problem)
    if experts and (problem := problem_of_experts(module)):
        raise refuse(problem)
    if "forward" in module.__dict__ and "_old_forward" not in module.__dict__:  # Accelerate's hooks keep the old one
        raise refuse(
            "its forward was replaced on the instance: attach before that step (a tp_plan of Transformers does it too: "
            "load without it, and shard by torch's parallelize_module)"
        )
    if managed_by_fsdp(module):
        raise refuse("its weight is sharded by fully_shard already: attach before that step")
    if is_sharded(getattr(module, "weight", None)):
        from unilora_ext.sharded_linear import UniLoRAShardedLinear, problem_of

        if type(module) is not nn.Linear or problem_of(module):
            raise refuse(problem_of(module) or "expected a torch.nn.Linear around a sharded weight")
        return UniLoRAShardedLinear
    if experts:
        if not all(map(_is_plain, module.parameters())):
            raise refuse("expected plain parameters, not quantised or sharded ones")
        return adapted_experts(module)
    if plain is None or not (_is_plain(module.weight) or _is_conv1d(module)):
        if _features(module) is None:
            raise refuse(f"expected a plain floating weight, got a {type(module.weight).__name__}")
        return updated_class(type(module))
    if not module.weight.is_floating_point():
        raise refuse(f"expected a floating weight, got {module.weight.dtype}")
    return plain


def _plain_class(module: nn.Module) -> type[FusedLayer] | None:
    """The class that adapts a module of this type around a plain weight; None: there is none."""
    if _is_conv1d(module):
        from unilora_ext.conv1d import UniLoRAConv1D

        return UniLoRAConv1D
    kind = type(module)
    if kind not in _PLAIN and isinstance(module, nn.Embedding) and extends_forward(kind, nn.Embedding):
        return updated_class(UniLoRAEmbedding, kind)  # such as one that scales
    return _PLAIN.get(kind)


_PLAIN: dict[type[nn.Module], type[FusedLayer]] = {
    nn.Linear: UniLoRALinear,
    nn.Embedding: UniLoRAEmbedding,
    nn.Conv1d: UniLoRAConv1d,
    nn.Conv2d: UniLoRAConv2d,
    nn.Conv3d: UniLoRAConv3d,
}


def _linear_endings(model: nn.Module) -> str:
    endings: dict[str, int] = {}
    for name, module in model.named_modules():
        if name and _is_linear(module):
            ending = name.rpartition(".")[2]
            endings[ending] = endings.get(ending, 0) + 1
    if not endings:
        return "no linear layers"
    return "the linear layers " + ", ".join(f"{name} (x{count})" for name, count in sorted(endings.items()))
