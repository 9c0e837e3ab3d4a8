"""What a user chooses."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from unilora_ext.errors import UniLoRAError, shown
from unilora_ext.projections import projection_class

__all__ = ["UniLoRAConfig", "default_d"]

# D / d in the paper: 17.1 for RoBERTa-large, 19.1 for Llama2-7B.
_RATIOS = (17, 19)


def default_d(D: int) -> int:
    """The roundest d (highest power of two as a divisor) with D / d between 17 and 19, the paper's ratios."""
    low, high = -(-D // _RATIOS[1]), D // _RATIOS[0]
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
        d: length of theta_d; None: the paper's ratio, see :func:`default_d`.
        target_modules: which linear layers are adapted: a list of names or name endings (``["query", "value"]``), a
            regular expression that must match the whole module name, or ``"all-linear"`` (every linear layer but the
            output head and those that are known to be read and not called).
        projection: ``"uniform"`` (the paper's), ``"balanced"``, or ``"peft"`` (PEFT's own index, A before B).
        seed: of P, in [0, 2^63). theta_d itself starts from PyTorch's global generator.
        alpha: the update is scaled by alpha / r; None: by 1, as in the paper's code.
        dropout: probability with which an input of the LoRA path is zeroed in training.
        init_bound: theta_d starts uniform in [-init_bound, init_bound]. 0 would never train: both factors and so all
            gradients would be zero.
        materialize: whether the projection's index is stored (4 bytes an element of theta_D on the CPU, 8 on CUDA) or
            computed anew each time (0 bytes, slower, on the CPU); the same values and gradients. None: stored, but
            for D > 2^27 on the CPU.
        modules_to_save: modules (names or name endings) that are trained and saved whole, such as a new classifier.

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
    init_bound: float = 0.02
    modules_to_save: Sequence[str] = ()
    materialize: bool | None = None

    def __post_init__(self) -> None:
        _expect("r", _is_size(self.r), "an integer in [1, 2^31)", self.r)
        _expect("d", self.d is None or _is_size(self.d), "an integer in [1, 2^31) or None", self.d)
        _expect("seed", _is_int(self.seed) and 0 <= self.seed < 2**63, "an integer in [0, 2^63)", self.seed)
        _expect("alpha", self.alpha is None or _is_number(self.alpha), "a finite number or None", self.alpha)
        _expect("dropout", _is_number(self.dropout) and 0 <= self.dropout < 1, "a number in [0, 1)", self.dropout)
        _expect("init_bound", _is_number(self.init_bound) and self.init_bound > 0, "a number > 0", self.init_bound)
        _expect(
            "materialize",
            self.materialize is None or isinstance(self.materialize, bool),
            "True, False or None",
            self.materialize,
        )
        _expect("projection", isinstance(self.projection, str), "a name", self.projection)
        projection_class(self.projection)
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
