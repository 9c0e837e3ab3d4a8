"""Attaching one trainable vector to a model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor, nn

from unilora_ext.adapter import Adapter, set_class
from unilora_ext.attachment import CHILD, CONTAINERS, Attachment, exchanged_tensors, holder_of
from unilora_ext.config import UniLoRAConfig, make_projection, size_of
from unilora_ext.errors import AttachError, UniLoRAError
from unilora_ext.fused import FusedLayer, check_load, warn_merged
from unilora_ext.layer import LayerState
from unilora_ext.layout import Layout, Order
from unilora_ext.linear import start_on
from unilora_ext.pretrained import adopt, is_pretrained
from unilora_ext.projections import Projection, projection_class
from unilora_ext.sharded_tensors import full
from unilora_ext.shared_vector import SharedVector
from unilora_ext.targets import Target, find_modules, find_targets
from unilora_ext.uncalled import CallWatch, keep_called

__all__ = ["Inside", "Plan", "attach", "inner_model", "layout_of"]

logger = logging.getLogger("unilora_ext")


@dataclass(frozen=True)
class Plan:
    """All that attaching needs, checked, with the model untouched.

    Attributes:
        model: to adapt.
        entry: what is called for a forward pass of the model: itself, or what it is a part of.
        targets: layers that will be adapted, in the order of theta_D.
        config: with `d` filled in.
        layout: of theta_D.
        projection: P.
    """

    model: nn.Module
    entry: nn.Module
    targets: list[Target]
    config: UniLoRAConfig
    layout: Layout
    projection: Projection

    @classmethod
    def of(
        cls,
        model: nn.Module,
        config: UniLoRAConfig,
        whole_names: Sequence[str] | None = None,
        version: int | None = None,
        entry: nn.Module | None = None,
    ) -> Plan:
        """The plan for a configuration.

        Args:
            model: to adapt.
            config: what attach() was given.
            whole_names: as in :func:`~unilora_ext.targets.find_targets`.
            version: of the projection's algorithm; None: the newest.
            entry: as above; None: the model.

        Raises:
            AttachError: the configuration does not fit the model.
        """
        if not isinstance(model, nn.Module):
            raise AttachError(f"attach: model: expected a torch.nn.Module, got {type(model).__name__}")
        if not isinstance(config, UniLoRAConfig):
            raise AttachError(f"attach: config: expected a UniLoRAConfig, got {type(config).__name__}")
        if isinstance(model, nn.Linear):
            raise AttachError("attach: the model itself is a linear layer: use UniLoRALinear.from_linear(model, ...)")
        if hasattr(model, CHILD):
            raise AttachError(f"attach: {type(model).__name__} has an adapter (or another attribute '{CHILD}') already")
        targets = find_targets(model, config.target_modules, config.modules_to_save, whole_names)
        if hasattr(holder := holder_of(model), CHILD):
            raise AttachError(f"attach: {type(holder).__name__} has another attribute '{CHILD}' already")
        layout = layout_of(targets, config)
        for target in targets:
            if layout.order is Order.DENSE and not target.adapted_class.takes_dense:
                raise AttachError(
                    f"attach: '{target.name}' ({type(target.module).__name__}): expected a projection to A and B, got "
                    f"'{config.projection}', whose updates are dense"
                )
        try:
            projection = make_projection(config, layout, weights=lambda i: _plain_weight(targets[i]), version=version)
        except UniLoRAError as error:
            raise AttachError(f"attach: {error}") from error
        if config.d is None:
            D, d = layout.D, projection.d
            if size_of(config, layout) is None:
                logger.warning("d was not given: taking d = %d for D = %d (D / d = %.1f)", d, D, D / d)
            config = replace(config, d=d)
        return cls(model, entry or model, targets, config, layout, projection)

    def attach(self, start: Mapping[str, Tensor]) -> Adapter:
        """Changes the model; nothing in it can fail for a reason that the plan has not excluded.

        Args:
            start: ``theta_d`` and the projection's trained parts.
        """
        model, targets, config = self.model, self.targets, self.config
        slots = [t.adapted_class.local_slot(t.module, self.layout, i) for i, t in enumerate(targets)]
        for reduction in {slot.reduction for slot in slots} - {None}:
            for tensor in start.values():
                reduction.broadcast_(tensor)
        vector = SharedVector(start, self.projection, self.layout, slots, config.scaling)
        attachment = Attachment(
            config=config,
            requires_grad={name: p.requires_grad for name, p in model.named_parameters()},
            classes={t.name: type(t.module) for t in targets},
            saved_originals={name: t.detach().clone() for name, t in exchanged_tensors(model, config).items()},
        )
        vector.attachment = attachment

        model.requires_grad_(False)
        for _, module in find_modules(model, config.modules_to_save, "modules_to_save"):
            for parameter in module.parameters():
                parameter.requires_grad_(parameter.is_floating_point())
        for slot_id, target in enumerate(targets):
            set_class(target.module, target.adapted_class)
            target.module._unilora = LayerState(vector, slot_id, config.dropout)
        setattr(holder_of(model), CHILD, vector)
        attachment.handles += [
            *adopt(model, attachment.classes),
            *keep_called(model, attachment.classes),
            self.entry.register_forward_pre_hook(vector.begin),
            self.entry.register_forward_hook(vector.end, always_call=True),
            model.register_load_state_dict_pre_hook(check_load),
            model.register_state_dict_pre_hook(warn_merged),
            CallWatch(self.entry, vector),
        ]
        return Adapter(model)


def layout_of(targets: Sequence[Target], config: UniLoRAConfig) -> Layout:
    """theta_D of these targets."""
    return Layout(tuple((t.m, t.n) for t in targets), config.r, projection_class(config.projection).order)


def attach(model: nn.Module, config: UniLoRAConfig) -> Adapter:
    """Adapts a model in place: the targets become :class:`UniLoRALinear`, everything else is frozen.

    The target modules keep their identity, parameters, names and hooks: only their class changes, so the model's
    ``state_dict`` gains one entry, ``unilora.theta_d``, and loses none.

    Args:
        model: any ``nn.Module``; on the meta device too. In a container (a SentenceTransformer, say) the Transformers
            model is adapted, if all of the configuration's modules lie in it.
        config: see :class:`UniLoRAConfig`.

    Returns:
        The adapter. ``adapter.theta_d`` is the trainable vector; ``model.parameters()`` yields it once.

    Raises:
        AttachError: the configuration does not fit the model, which is then unchanged.
    """
    inside = inner_model(model)
    if inside is not None and _says_the_same(config, model, inside.model):
        plan = Plan.of(inside.model, config, entry=inside.entry)
    else:
        plan = Plan.of(model, config)
    return plan.attach(start_on(plan.projection, plan.targets[0].like(), config.init_bound))


class Inside(NamedTuple):
    """A Transformers model in a container, and the element that calls it."""

    model: nn.Module
    entry: nn.Module


def inner_model(model: nn.Module) -> Inside | None:
    """The one Transformers model in a container; None: `model` is none, or has more or less than one."""
    found: dict[str, nn.Module] = {}
    if isinstance(model, CONTAINERS):
        for name, part in model.named_modules():
            if is_pretrained(part) and not any(name.startswith(f"{above}.") for above in found):
                found[name] = part
    if len(found) != 1:
        return None
    (name, inner), entry = next(iter(found.items())), model
    for child in name.split("."):
        if isinstance(entry, CONTAINERS):
            entry = entry.get_submodule(child)
    return Inside(inner, entry)


def _says_the_same(config: UniLoRAConfig, model: nn.Module, inner: nn.Module) -> bool:
    """Whether a configuration names the same modules of a container as of the model in it."""
    try:
        return _modules_of(model, config) == _modules_of(inner, config)
    except UniLoRAError:  # said again of the container
        return False


def _modules_of(model: nn.Module, config: UniLoRAConfig) -> tuple[list[int], list[int]]:
    """The targets and modules_to_save of a model, by identity."""
    targets = find_targets(model, config.target_modules, config.modules_to_save)
    whole = find_modules(model, config.modules_to_save, "modules_to_save")
    return [id(target.module) for target in targets], [id(module) for _, module in whole]


def _plain_weight(target: Target) -> Tensor:
    """W [m, n] of a target, for projections that are made from it.

    Raises:
        AttachError: it has no values, or is not stored as plain numbers.
    """
    weight = getattr(target.module, "weight", None)
    if not issubclass(target.adapted_class, FusedLayer) or weight is None or weight.is_meta:
        got = "one on the meta device" if getattr(weight, "is_meta", False) else f"a {type(target.module).__name__}"
        raise AttachError(
            f"'{target.name}': expected a plain floating weight with values, which this projection is made from; "
            f"got {got}"
        )
    return target.adapted_class.as_matrix(full(weight))
