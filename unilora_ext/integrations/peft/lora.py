"""An adapter from a LoRA: the theta_d whose matrices are nearest to the LoRA's."""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unilora_ext.adapter import Adapter
from unilora_ext.checkpoint import THETA_D_DTYPES
from unilora_ext.config import UniLoRAConfig
from unilora_ext.errors import AdapterFileError, UniLoRAError, shown
from unilora_ext.export import exact_targets
from unilora_ext.functional import accumulator_dtype
from unilora_ext.integrations.peft.folder import config_path, present_modules, read_record, read_tensors
from unilora_ext.layout import Layout
from unilora_ext.loading import attach_saved, check_same, fitting_plan, model_with, shapes_of
from unilora_ext.projections import Projection
from unilora_ext.record import conform
from unilora_ext.sharded_tensors import full
from unilora_ext.targets import Target, find_targets

__all__ = ["from_lora"]

logger = logging.getLogger("unilora_ext")

_FACTOR = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B)")
"""(module, PEFT's name of a factor)"""


class _Record(msgspec.Struct):
    """What ``adapter_config.json`` must say."""

    r: Annotated[int, msgspec.Meta(ge=1, lt=2**31)] = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    bias: str = "none"
    init_lora_weights: bool | str = True
    modules_to_save: list[str] | None = None

    @property
    def alpha(self) -> float:
        """Of y = W x + alpha / r B A x."""
        return self.lora_alpha * math.sqrt(self.r) if self.use_rslora else self.lora_alpha


_WITHOUT_EFFECT = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"),
    *("task_type", "fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),  # the tensors say which
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # of init_lora_weights
}
"""Fields that do not change what the tensors compute. Any other one, of today or later, may."""
_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""init_lora_weights that leave the model's own weights as they are."""

LINEAR = ("identity", "uniform", "balanced", "peft", "local", "nonuniform", "countsketch", "gaussian", "fastfood")
"""Projections of any d, or of d = D, with theta_D = P theta_d: no offset, no trained parts, B and A in theta_D."""


class Factors(NamedTuple):
    """dW = s B A, in float64: B [m, r], A [r, n]."""

    B: Tensor
    A: Tensor


@torch.no_grad()
def from_lora(
    model: nn.Module, folder: str | Path, d: int | None = None, *, projection: str | None = None, seed: int = 0
) -> Adapter:
    """Attaches a LoRA that PEFT saved, projected to d numbers, to be trained on; PEFT is not needed.

    theta_d is the least-squares solution of P theta_d = theta_D, the B and A of all layers; for an isometric P it is
    P^T theta_D. What survives is logged, as a warning: |P theta_d|^2 / |theta_D|^2, and, of the updates of all layers,
    1 - |dW' - dW|^2 / |dW|^2. A random theta_D keeps d / D of its energy at best, and an update, a product of two
    parts of it, less: this is a place to start from, not a compression.

    The split of dW into B and A is free. That of least |B|^2 + |A|^2 is projected, U sqrt(S) and sqrt(S) V^T of its
    singular values S, as all positions of theta_D share one theta_d. With B of 1/15 of A's size, as early in
    training, and d = D / 2, that keeps 19 % of the updates; the matrices as they were saved would leave an error of 5
    times their energy.

    Args:
        model: the model that the LoRA was trained on, plain, or one with the same modules.
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``, of PEFT or of
            :meth:`Adapter.export_lora`. The names of its tensors say which modules are adapted.
        d: length of theta_d. None, or D, the number of values of the LoRA: B and A are projected as they are saved.
        projection: one with theta_D = P theta_d. None: ``"uniform"``; with d = D ``"identity"``, the LoRA itself.
        seed: of P.

    Returns:
        The adapter, with the LoRA's scaling and dropout; its modules_to_save have the LoRA's values.

    Raises:
        AdapterFileError: the folder is incomplete or damaged, not of a LoRA, of another form of it (DoRA, ranks that
            differ, trained biases, a start that changes the model's weights, ...), or its tensors are not those of
            the model's modules. The model is unchanged, as with the errors below.
        AttachError: the modules cannot be adapted.
        UniLoRAError: another projection, or d is out of range; or all updates are zero and d < D.
    """
    if projection not in (None, *LINEAR):
        raise UniLoRAError(f"from_lora: projection: expected None or one of {LINEAR}, got {shown(projection)}")
    folder = Path(folder)
    theirs = _read(folder)
    tensors = read_tensors(folder)
    saved = _take_factors(tensors)
    D = sum(tensor.numel() for factors in saved.values() for tensor in factors.values())
    d = D if d is None else d
    projection = projection or ("identity" if d == D else "uniform")
    model, entry = model_with(model, saved)
    names = _present(model, folder, saved)
    try:
        config = _convert(model, names, theirs, d=d, projection=projection, seed=seed)
        targets = find_targets(model, config.target_modules, config.modules_to_save, names)
    except UniLoRAError as error:
        raise type(error)(f"{folder}: does not fit this {type(model).__name__}: {error}") from error
    given = _fitting_factors(targets, folder, saved, theirs.r)
    _take_base_weights(targets, folder, tensors)
    plan = fitting_plan(model, folder, config, names, entry=entry)

    split = given if d == D else [least_factors(*factors) for factors in given]
    theta_D = _joined(split, plan.layout)
    if d < D and not theta_D.any():
        raise UniLoRAError(f"{folder}: expected a trained LoRA, got one whose updates are all zero")
    P = copy.copy(plan.projection)  # without what that keeps on a device: float64 is for here alone
    theta_d = least_squares(P, theta_D)
    theta_d = theta_d.to(accumulator_dtype(plan.targets[0].like().dtype))  # float32, float64 in a float64 model
    projected = P(theta_d.double())
    of_vector = _share((projected - theta_D).square().sum(), theta_D.square().sum())
    of_updates = share_of_updates(given, _cut(projected, plan.layout))
    adapter = attach_saved(plan, folder, theta_d, {}, tensors)
    logger.log(
        logging.WARNING if of_updates < 1 - 1e-6 else logging.INFO,
        "from_lora: projection '%s', d = %d, D = %d: %.1f %% of theta_D and %.1f %% of the updates survive",
        *(projection, d, D, 100 * of_vector, 100 * of_updates),
    )
    return adapter


# ---- the folder -----------------------------------------------------------------------------------------------------


def _read(folder: Path) -> _Record:
    """The configuration of a LoRA with nothing but A and B."""
    path, record = config_path(folder), read_record(folder, "LORA")
    theirs = conform(record, _Record, path)
    if theirs.bias != "none":
        raise AdapterFileError(f"{path}: bias: expected 'none' (biases are not trained here), got {shown(theirs.bias)}")
    if theirs.init_lora_weights not in _STARTS:
        raise AdapterFileError(
            f"{path}: init_lora_weights: expected one of {_STARTS}, got {shown(theirs.init_lora_weights)}, a start "
            "that changes the model's own weights; PEFT's path_initial_model_for_weight_conversion saves a plain LoRA"
        )
    for name, value in record.items():
        if value and name not in (*_WITHOUT_EFFECT, *_Record.__struct_fields__):
            raise AdapterFileError(
                f"{path}: {name}: expected none, as a LoRA of one rank and scaling has it; got {shown(value)}"
            )
    return theirs


def _take_factors(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Takes the factors out of `tensors`: by module, then by PEFT's name of them."""
    factors: dict[str, dict[str, Tensor]] = {}
    for match in filter(None, map(_FACTOR.fullmatch, list(tensors))):
        factors.setdefault(match[1], {})[match[2]] = tensors.pop(match[0])
    return factors


def _present(model: nn.Module, folder: Path, names: Collection[str]) -> list[str]:
    """The names, all of modules, in the model's order."""
    if not names:
        raise AdapterFileError(f"{folder}: expected tensors named <module>.lora_A.weight, found none")
    present = [name for name, _ in model.named_modules()]
    if unknown := sorted(set(names).difference(present)):
        raise AdapterFileError(
            f"{folder}: expected modules of this {type(model).__name__}, got {len(unknown)} others: {shown(unknown)}"
        )
    return [name for name in present if name in names]


def _convert(model: nn.Module, names: list[str], theirs: _Record, **chosen: Any) -> UniLoRAConfig:
    return UniLoRAConfig(
        r=theirs.r,
        target_modules=exact_targets(model, names),
        alpha=theirs.alpha,
        dropout=theirs.lora_dropout,
        modules_to_save=present_modules(model, theirs.modules_to_save or ()),
        **chosen,
    )


def _take_base_weights(targets: Sequence[Target], folder: Path, tensors: dict[str, Tensor]) -> None:
    """Takes the own weights of adapted layers out of `tensors`: PEFT saves those of tables and heads. They must be the
    model's."""
    for target in targets:
        start = f"{target.name}.base_layer."
        for name in [name for name in tensors if name.startswith(start)]:
            own, stored = target.module.state_dict().get(name.removeprefix(start)), tensors.pop(name)
            if own is None or own.is_meta or not torch.equal(stored.to(own.dtype), full(own).cpu()):
                raise AdapterFileError(
                    f"{folder}: '{name}': expected the model's own values, got others: was it resized?"
                )


def _fitting_factors(
    targets: Sequence[Target], folder: Path, saved: dict[str, dict[str, Tensor]], r: int
) -> list[Factors]:
    """The factors in the order of the targets, whose shapes they must have."""
    expected: dict[str, list[int]] = {}
    for target in targets:
        try:
            shapes = target.adapted_class.plain_lora_shapes(target.module, target.m, target.n, r)
        except UniLoRAError as error:
            raise AdapterFileError(f"{folder}: '{target.name}': {error}") from error
        expected |= {f"{target.name}.{name}": list(shape) for name, shape in shapes.items()}
    flat = {f"{module}.{name}": tensor for module, factors in saved.items() for name, tensor in factors.items()}
    check_same(folder, "the LoRA's matrices", shapes_of(flat), expected)
    for name, tensor in flat.items():
        if tensor.dtype not in THETA_D_DTYPES or not tensor.isfinite().all():
            got = tensor.dtype if tensor.dtype not in THETA_D_DTYPES else "infinite or no numbers"
            raise AdapterFileError(
                f"{folder}: '{name}': expected finite float16, bfloat16, float32 or float64, got {got}"
            )
    matrices = iter([flat[name].double().flatten(1) for name in expected])
    return [Factors(B, A) for A, B in zip(matrices, matrices, strict=True)]


# ---- the projection -------------------------------------------------------------------------------------------------


def least_factors(B: Tensor, A: Tensor) -> Factors:
    """The factors of B A with the least |B|^2 + |A|^2: equal by column and row, both zero beyond the rank."""
    (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    U, S, V = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    root, missing = S.sqrt(), len(A) - len(S)
    return Factors(F.pad(Q_B @ U * root, (0, missing)), F.pad(root[:, None] * (V @ Q_A.T), (0, 0, 0, missing)))


def _joined(factors: Sequence[Factors], layout: Layout) -> Tensor:
    """theta_D."""
    theta_D = torch.empty(layout.D, dtype=torch.float64, device="cpu")
    for module, (B, A) in enumerate(factors):
        theta_D[slice(*layout.range_of_B(module))] = B.flatten()
        theta_D[slice(*layout.range_of_A(module))] = A.flatten()
    return theta_D


def _cut(theta_D: Tensor, layout: Layout) -> list[Factors]:
    """The reverse of :func:`_joined`."""
    parts = []
    for module, (m, n) in enumerate(layout.shapes):
        B, A = (theta_D[slice(*ranges(module))] for ranges in (layout.range_of_B, layout.range_of_A))
        parts.append(Factors(B.view(m, layout.r), A.view(layout.r, n)))
    return parts


_MOST_STEPS = 1000
_PRECISION = 1e-12


def least_squares(P: Projection, theta_D: Tensor) -> Tensor:
    """The theta_d with the least |P theta_d - theta_D|, by conjugate gradients: one step where P^T P = I, or the
    identity on the columns that are not empty.

    Args:
        P: without trained parts, c = 0.
        theta_D: [D], float64.

    Returns:
        [d], float64; of all solutions, the one of least norm.

    Raises:
        UniLoRAError: it is not found, since P is near to one that has not full rank.
    """
    theta_d, rest = theta_D.new_zeros(P.d), theta_D
    direction = gradient = P.transpose(rest)
    square = first = gradient.dot(gradient)
    for _ in range(_MOST_STEPS):
        if square <= _PRECISION**2 * first:
            return theta_d
        image = P(direction)
        step = square / image.dot(image)
        theta_d, rest = theta_d + step * direction, rest - step * image
        gradient, before = P.transpose(rest), square
        square = gradient.dot(gradient)
        direction = gradient + square / before * direction
    raise UniLoRAError(
        f"from_lora: least squares: {P} is nearly singular, no solution in {_MOST_STEPS} steps: try a smaller d"
    )


# ---- what is lost ---------------------------------------------------------------------------------------------------


def share_of_updates(given: Sequence[Factors], now: Sequence[Factors]) -> float:
    """1 - |dW' - dW|^2 / |dW|^2 over all layers; may be negative."""
    whole = sum(_squared_norm(*factors) for factors in given)
    lost = sum(
        _squared_norm(torch.cat([B, own_B], 1), torch.cat([A, -own_A]))
        for (B, A), (own_B, own_A) in zip(now, given, strict=True)
    )
    return _share(lost, whole)


def _share(lost: Tensor, whole: Tensor) -> float:
    """What is left."""
    return 1.0 if lost == 0 else float(1 - lost / whole)


def _squared_norm(B: Tensor, A: Tensor) -> Tensor:
    """|B A|^2 = trace(B^T B A A^T), without the product."""
    return ((B.T @ B) * (A @ A.T)).sum()
