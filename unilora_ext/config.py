"""What a user chooses."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from unilora_ext.errors import UniLoRAError, shown
from unilora_ext.layout import Layout
from unilora_ext.projections import Given, Projection, projection_class
from unilora_ext.projections.base import Weights

__all__ = ["UniLoRAConfig", "default_d", "make_projection", "size_of"]

# D / d in the paper: 17.1 for RoBERTa-large, 19.1 for Llama2-7B. Small models lose a point by it, for the sake of a few
# kB (docs/quality.md).
_RATIOS, _SMALL_RATIOS = (17, 19), (4, 5)
_FEW = 4096


def default_d(D: int) -> int:
    """The d that is taken where none is given: the roundest one (highest power of two as a divisor) with D / d between
    17 and 19, the paper's ratios; at least 4,096, where that is at most a fourth of D, and for a smaller D the roundest
    one with D / d between 4 and 5."""
    if D // _SMALL_RATIOS[0] <= _FEW:
        return _roundest(D, *_SMALL_RATIOS)
    return max(_roundest(D, *_RATIOS), _FEW)


def _roundest(D: int, least: int, most: int) -> int:
    """The roundest d with D / d in [least, most]."""
    low, high = -(-D // most), D // least
    if low > high:  # D too small for an integer in between
        return max(1, low)
    step = 1 << high.bit_length()
    while high // step * step < low:
        step >>= 1
    return high // step * step


@dataclass(frozen=True)
class UniLoRAConfig:
    """Configuration of a Uni-LoRA adapter.

    Attributes:
        r: rank of every B_l A_l.
        d: length of theta_d; None: what the sizes give, or an 18th of D but at least 4,096, see :func:`default_d`.
        target_modules: which layers are adapted (linear ones, embeddings, convolutions, stacked experts): a list of
            names or name endings (``["query", "value"]``), a regular expression that must match the whole module name,
            or ``"all-linear"`` (every linear layer but the output head and those that are known to be read and not
            called).
        projection: how theta_d becomes the layers' updates: ``"uniform"`` (the paper's), or another name of
            :data:`~unilora_ext.family.FAMILY`.
        seed: of P, in [0, 2^63). theta_d itself starts from PyTorch's global generator.
        alpha: the update is scaled by alpha / r; None: by 1, as in the paper's code.
        dropout: probability with which an input of the LoRA path is zeroed in training.
        init_bound: theta_d starts uniform in [-init_bound, init_bound]; None: as the projection has it, for Uni-LoRA
            0.005 sqrt(D / d). 0 would never train: both factors and so all gradients would be zero.
        materialize: whether the projection's index is stored (4 bytes an element of theta_D on the CPU, 8 on CUDA) or
            computed anew each time (0 bytes, slower; 4 for `uniform` trained on CUDA); the same values and gradients.
            None: stored, but for D > 2^27 on the CPU.
        modules_to_save: modules (names or name endings) that are trained and saved whole, such as a new classifier.
        projection_options: settings that this projection alone has, by name: see ``options`` of its class.

    Raises:
        UniLoRAError: a value out of range; the message names it.
    """

    r: int = 4
    d: int | None = None
    target_modules: Sequence[str] | str = "all-linear"
    projection: str = "uniform"
    seed: int = 0
    alpha: float | None = None
    dropout: float = 0.0
    init_bound: float | None = None
    modules_to_save: Sequence[str] = ()
    materialize: bool | None = None
    projection_options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _expect("r", _is_size(self.r), "an integer in [1, 2^31)", self.r)
        _expect("d", self.d is None or _is_size(self.d), "an integer in [1, 2^31) or None", self.d)
        _expect("seed", _is_int(self.seed) and 0 <= self.seed < 2**63, "an integer in [0, 2^63)", self.seed)
        _expect("alpha", self.alpha is None or _is_number(self.alpha), "a finite number or None", self.alpha)
        _expect("dropout", _is_number(self.dropout) and 0 <= self.dropout < 1, "a number in [0, 1)", self.dropout)
        bound = self.init_bound
        _expect("init_bound", bound is None or (_is_number(bound) and bound > 0), "a number > 0 or None", bound)
        _expect(
            "materialize",
            self.materialize is None or isinstance(self.materialize, bool),
            "True, False or None",
            self.materialize,
        )
        _expect("projection", isinstance(self.projection, str), "a name", self.projection)
        options = self.projection_options
        named = isinstance(options, Mapping) and all(isinstance(name, str) for name in options)
        _expect("projection_options", named, "a dictionary by name", options)
        object.__setattr__(self, "projection_options", dict(options))
        projection_class(self.projection).checked_options(options)
        if isinstance(self.target_modules, str):
            _check_pattern(self.target_modules)
        else:
            object.__setattr__(self, "target_modules", _names("target_modules", self.target_modules))
            _expect("target_modules", self.target_modules, "at least one name", self.target_modules)
        object.__setattr__(self, "modules_to_save", _names("modules_to_save", self.modules_to_save))

    @property
    def pattern(self) -> str | None:
        """target_modules, where it is a regular expression."""
        targets = self.target_modules
        return targets if isinstance(targets, str) and targets != "all-linear" else None

    @property
    def scaling(self) -> float:
        """s of y = W x + s B A x."""
        return 1.0 if self.alpha is None else self.alpha / self.r


def size_of(config: UniLoRAConfig, layout: Layout) -> int | None:
    """d, where the projection's sizes give it; None: it is free."""
    kind = projection_class(config.projection)
    return kind.size(layout, kind.checked_options(config.projection_options))


def make_projection(
    config: UniLoRAConfig, layout: Layout, *, weights: Weights, version: int | None = None
) -> Projection:
    """P of a model.

    Args:
        config: with d None: what the sizes give, or :func:`default_d`.
        layout: in the projection's order.
        weights: the base weights, for a projection that is made from them.
        version: of the projection's algorithm; None: the newest.

    Raises:
        UniLoRAError: d is given, and not what the sizes give; or more than D.
    """
    kind, given, size = projection_class(config.projection), config.d, size_of(config, layout)
    if size is not None and given not in (None, size):
        raise UniLoRAError(f"d: expected {size} or None, which the sizes give '{config.projection}'; got {given}")
    if size is None and given is not None and given > layout.D:
        raise UniLoRAError(
            f"d: expected at most D = {layout.D}, the number of values of the {len(layout)} target modules at "
            f"r = {config.r}; got {given}"
        )
    d = size or given or default_d(layout.D)
    options = kind.checked_options(config.projection_options)
    return kind.of(Given(layout, d, config.seed, version, config.materialize, options, weights))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: object) -> bool:
    return _is_int(value) and 1 <= value < 2**31


def _is_number(value: object) -> bool:
    """Whether `value` is a number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _expect(name: str, good: object, expected: str, got: object) -> None:
    if not good:
        raise UniLoRAError(f"UniLoRAConfig: {name}: expected {expected}, got {shown(got)}")


def _names(field: str, value: object) -> tuple[str, ...]:
    good = isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(v, str) and v for v in value)
    _expect(field, good, "a list of module names", value)
    return tuple(sorted(value)) if isinstance(value, (set, frozenset)) else tuple(value)


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise UniLoRAError(
            f"UniLoRAConfig: target_modules: expected a list, 'all-linear' or a regular expression, "
            f"got {shown(pattern)} ({error})"
        ) from error
