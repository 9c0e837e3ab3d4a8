"""theta_D = c + P theta_d."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from unilora_ext._native import _C
from unilora_ext._operators import accumulator_dtype
from unilora_ext.errors import UniLoRAError, shown
from unilora_ext.layout import Layout, Order, Range
from unilora_ext.projections.restriction import Restriction, cut, widened

__all__ = ["Given", "Option", "Projection", "Weights", "expect_tensors", "faking", "kept", "ordinary"]

LORA_START = 0.005
"""Bound of the entries of theta_D at the start: that of the paper's GLUE runs, 0.02 at D / d = 17."""

Weights = Callable[[int], Tensor]
"""The base weight W [m, n] of a module of the layout, by its number: a plain floating tensor with values."""


def faking() -> bool:
    """Whether tensors are fakes now (``FakeTensorMode``): what is made then has no values and cannot be kept."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


@dataclass(frozen=True)
class Option:
    """A setting that one projection has.

    Attributes:
        default: its value where none is given; None: chosen by the projection.
        text: what it says, for people.
        least: the smallest number it may be.
    """

    default: Any
    text: str
    least: float | None = None

    def check(self, name: str, value: Any) -> None:
        """Raises where `value` is not of the kind of the default, or out of range."""
        kind = type(self.default) if self.default is not None else int
        good = value is None if self.default is None and value is None else type(value) is kind
        if kind is float:
            good = type(value) in (int, float) and value - value == 0  # finite
        if good and value is not None and self.least is not None:
            good = value >= self.least
        if not good:
            expected = {bool: "True or False", int: "an integer", float: "a finite number"}.get(kind, kind.__name__)
            bound = "" if self.least is None else f" >= {self.least}"
            raise UniLoRAError(f"{name}: expected {expected}{bound}, got {shown(value)}")


@dataclass(frozen=True)
class Given:
    """What the projection of a model is made from.

    Attributes:
        layout: of theta_D.
        d: length of theta_d.
        seed: of the projection.
        version: of its algorithm; None: the newest.
        materialize: whether an index is stored; see :class:`~unilora_ext.UniLoRAConfig`.
        options: all of the projection's options.
        weights: the base weights.
    """

    layout: Layout
    d: int
    seed: int
    version: int | None
    materialize: bool | None
    options: Mapping[str, Any]
    weights: Weights


class Projection(ABC):
    """theta_D = c + P theta_d, P [D, d] and c [D] fixed but for the trained parts that P may have.

    Immutable: copies share it. What is computed from it on a device is made at first use and kept, see
    :meth:`restrict`: as ordinary tensors, whatever mode the first use is in, for the uses that follow.

    Attributes:
        name: of the projection in an adapter file.
        versions: of its algorithm, ascending; an adapter file keeps the number, and what is published stays.
        version: that of this P.
        order: what theta_D holds of each module.
        trained: names of P's own trained parts.
        stored_names: all names that :meth:`stored` may give.
        options: settings beside d and the seed.
        learning_rates: of theta_d and the trained parts, to begin with, under AdamW, where the method has its own;
            empty: theta_d has that of a LoRA matrix times :attr:`stretch`.
        most_rows: the largest D.
        D: number of rows, the length of theta_D.
        d: number of columns, the length of theta_d.
        seed: of what is drawn at random in P.
        given_options: all of `options`, with the values that they have here.
    """

    name: ClassVar[str]
    versions: ClassVar[tuple[int, ...]] = (1,)
    order: ClassVar[Order] = Order.B_A
    trained: ClassVar[tuple[str, ...]] = ()
    stored_names: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[Mapping[str, Option]] = {}
    learning_rates: ClassVar[Mapping[str, float]] = {}
    most_rows: ClassVar[int] = 1 << 53  # integers that every reader of JSON has

    def __init__(
        self, D: int, d: int, seed: int = 0, version: int | None = None, given_options: Mapping[str, Any] | None = None
    ) -> None:
        for what, value, limit in (("D", D, self.most_rows), ("d", d, _C.max_elements)):
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
                raise UniLoRAError(f"{type(self).__name__}: {what}: expected an integer in [1, {limit}], got {value!r}")
        self.version = self.versions[-1] if version is None else version
        if self.version not in self.versions:
            raise UniLoRAError(f"{type(self).__name__}: version: expected one of {self.versions}, got {version!r}")
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
            raise UniLoRAError(f"{type(self).__name__}: seed: expected an integer in [0, 2^63), got {seed!r}")
        self.D, self.d, self.seed = D, d, seed
        self.given_options = self.checked_options(given_options or {})
        self._restrictions: dict[torch.device, Restriction] = {}

    # -- what a kind of projection says -------------------------------------------------------------------------------

    @classmethod
    def size(cls, layout: Layout, options: Mapping[str, Any]) -> int | None:
        """d, where the sizes give it; None: it is free."""
        return None

    @classmethod
    @abstractmethod
    def of(cls, given: Given) -> Projection:
        """P of a model."""

    def spec(self) -> dict[str, Any]:
        """What an adapter file keeps of P, beside D and d; raises where P has no short description."""
        return {"name": self.name, "version": self.version, "seed": self.seed, "options": dict(self.given_options)}

    @abstractmethod
    def _restrict(self, device: torch.device, ranges: Sequence[Range]) -> Restriction: ...

    @classmethod
    @abstractmethod
    def compute(
        cls, theta_d: Tensor, trained: Sequence[Tensor], operands: tuple[Any, ...], dtype: torch.dtype
    ) -> Tensor:
        """theta_D of some rows in `dtype`, from what :meth:`Restriction.operands` gave: plain operators, so that a
        graph of them can be traced and differentiated."""

    def start(self, dtype: torch.dtype, bound: float | None = None) -> dict[str, Tensor]:
        """``theta_d`` and the trained parts as training begins, on the CPU, drawn by PyTorch's global generator.

        Args:
            dtype: float32 or float64.
            bound: where theta_d starts uniform in [-bound, bound], the bound; None: 0.005 times :attr:`stretch`, by
                which theta_D starts alike for every d (the paper's 0.02 where D / d is 16).

        Raises:
            UniLoRAError: theta_d starts in another way, and a bound is given.
        """
        bound = LORA_START * self.stretch if bound is None else bound
        return {"theta_d": torch.empty(self.d, dtype=dtype, device="cpu").uniform_(-bound, bound)}

    def stored(self, trained: Mapping[str, Tensor], resumable: bool = False) -> dict[str, Tensor]:
        """What an adapter file keeps beside theta_d: the trained parts, and what tells whether P is made anew as it
        was, where that depends on more than the seed.

        Args:
            trained: the trained parts.
            resumable: whether training must go on from the file as if it had not been interrupted; a small form that
                gives the same P is not enough then.
        """
        return dict(trained)

    def restored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The trained parts from what :meth:`stored` gave.

        Raises:
            UniLoRAError: other names, shapes or types, or another P.
        """
        return expect_tensors(tensors, {name: list(t.shape) for name, t in self._trained_like().items()})

    def parents(self, d: int) -> Tensor:
        """Where this P with `d` columns, all else equal, has each column split into d / self.d: the column of this P
        that holds all rows of a new one.

        Args:
            d: a larger multiple of :attr:`d`.

        Returns:
            int64 [d] on the CPU.

        Raises:
            UniLoRAError: another `d`, or columns that do not split.
        """
        raise UniLoRAError(
            f"{self}: expected a projection whose columns split ('uniform', 'balanced' or 'countsketch'), "
            f"got '{self.name}'"
        )

    @property
    def stretch(self) -> float:
        """How much larger an entry of theta_d is than one of theta_D, root mean squares, where theta_d is random:
        sqrt(D / d) where P is isometric. A step of Adam moves an entry of theta_D by the learning rate over this."""
        return math.sqrt(self.D / self.d)

    # -- what is derived ----------------------------------------------------------------------------------------------

    @classmethod
    def checked_options(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """All options, those that are not given by their defaults.

        Raises:
            UniLoRAError: an option that this projection has not, or a value that it cannot have.
        """
        for name, value in given.items():
            if name not in cls.options:
                raise UniLoRAError(
                    f"projection_options: expected {list(cls.options) or 'none'} for '{cls.name}', got {shown(name)}"
                )
            cls.options[name].check(f"projection_options['{name}']", value)
        return {name: given.get(name, option.default) for name, option in cls.options.items()}

    def restrict(self, device: torch.device | str, ranges: Sequence[Range] | None = None) -> Restriction:
        """The rows of `ranges`, one after the other, on `device`; None: all rows (made once a device and kept)."""
        device, whole = torch.device(device), [(0, self.D)]
        if faking() or not (ranges is None or list(ranges) == whole):
            return ordinary(lambda: self._restrict(device, whole if ranges is None else ranges))
        if (found := self._restrictions.get(device)) is None:
            found = self._restrictions[device] = kept(device, lambda: self._restrict(device, whole))
        return found

    def keeps_rows(self, restriction: Restriction) -> bool:
        """Whether these are the rows that :meth:`restrict` keeps."""
        return self._restrictions.get(restriction.device) is restriction

    def matrices_in_graph(
        self,
        theta_d: Tensor,
        ranges: Sequence[Range],
        shapes: Sequence[tuple[int, ...]],
        dtype: torch.dtype,
        trained: Sequence[Tensor] = (),
    ) -> tuple[Tensor, ...]:
        """:meth:`Restriction.matrices` of the rows of `ranges`, for a graph that is being traced."""
        theta_d, trained = widened(theta_d), tuple(map(widened, trained))
        operands = _constant_operands(self, theta_d.device, tuple(ranges), theta_d.dtype)
        return cut(self.compute(theta_d, trained, operands, dtype), shapes)

    def __call__(self, theta_d: Tensor, dtype: torch.dtype | None = None, trained: Sequence[Tensor] = ()) -> Tensor:
        """theta_D = c + P theta_d, differentiable.

        Args:
            theta_d: [d], float32 or float64 (half types are widened to float32), on any device.
            dtype: of the result; default: that of `theta_d`.
            trained: P's own trained parts, in the order of :attr:`trained`.

        Returns:
            theta_D: [D] on the device of `theta_d`.
        """
        self._check_vector("theta_d", theta_d, self.d)
        self._check_trained(trained)
        return self.restrict(theta_d.device).project(theta_d, dtype, trained)

    def transpose(self, g_D: Tensor, dtype: torch.dtype | None = None, trained: Sequence[Tensor] = ()) -> Tensor:
        """P^T g_D, differentiable: [D] -> [d], summed in float32 (float64 for float64) in a fixed order."""
        self._check_vector("g_D", g_D, self.D)
        self._check_trained(trained)
        dtype = dtype or accumulator_dtype(g_D.dtype)
        at = (torch.zeros(self.d, dtype=dtype, device=g_D.device), *trained) if trained else ()
        return self.restrict(g_D.device).transpose([g_D], dtype, at)[0]

    def offset(self, dtype: torch.dtype = torch.float64, trained: Sequence[Tensor] = ()) -> Tensor:
        """c [D] on the CPU."""
        return self(torch.zeros(self.d, dtype=dtype), trained=trained)

    def dense(self, dtype: torch.dtype = torch.float64, trained: Sequence[Tensor] = ()) -> Tensor:
        """P as a dense matrix [D, d] on the CPU: for tests and small examples."""
        offset = self.offset(dtype, trained)
        columns = [self(unit, trained=trained) - offset for unit in torch.eye(self.d, dtype=dtype)]
        return torch.stack(columns, dim=1)

    def _trained_like(self) -> dict[str, Tensor]:
        """The trained parts, without values."""
        with torch.random.fork_rng(devices=[]):
            return {name: t for name, t in self.start(torch.float32).items() if name != "theta_d"}

    def _split(self, d: int) -> int:
        """d / self.d, the new columns of :meth:`parents` in each of these."""
        if type(d) is not int or not self.d < d <= self.D or d % self.d:
            raise UniLoRAError(
                f"{self}: d: expected a multiple of {self.d}, larger than it and at most D = {self.D}, got {shown(d)}"
            )
        return d // self.d

    def _check_vector(self, what: str, value: Tensor, length: int) -> None:
        if tuple(value.shape) != (length,) or not value.is_floating_point():
            raise UniLoRAError(
                f"{self}: {what}: expected a floating tensor of shape [{length}], "
                f"got {value.dtype} of shape {list(value.shape)}"
            )

    def _check_trained(self, trained: Sequence[Tensor]) -> None:
        if len(trained) != len(self.trained):
            raise UniLoRAError(f"{self}: trained: expected {list(self.trained) or 'none'}, got {len(trained)} tensors")

    def _no_bound(self, bound: float | None) -> None:
        if bound is not None:
            raise UniLoRAError(
                f"init_bound: expected None for '{self.name}', which has a start of its own; got {bound}"
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}(D={self.D}, d={self.d}, seed={self.seed})"

    def __deepcopy__(self, memo: dict) -> Projection:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_restrictions": {}}


def expect_tensors(tensors: Mapping[str, Tensor], shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """Floating tensors of these names and shapes.

    Raises:
        UniLoRAError: others.
    """
    got = {name: list(t.shape) for name, t in tensors.items()}
    if got != dict(shapes) or not all(t.is_floating_point() for t in tensors.values()):
        raise UniLoRAError(f"trained parts: expected floating tensors {dict(shapes)}, got {shown(got)}")
    return {name: tensors[name] for name in shapes}


_Made = TypeVar("_Made")


def ordinary(make: Callable[[], _Made]) -> _Made:
    """What `make` makes, as ordinary tensors, which may be kept: in inference mode, too."""
    with torch.inference_mode(False):
        return make()


def kept(device: torch.device, make: Callable[[], _Made]) -> _Made:
    """What `make` makes on `device`, :func:`ordinary` and finished, so that any stream may use it from here on, and
    none uses what it replaces.

    Raises:
        UniLoRAError: a CUDA graph is being captured, whose memory is not there to keep.
    """
    if device.type != "cuda":
        return ordinary(make)
    if torch.cuda.is_current_stream_capturing():
        raise UniLoRAError(
            "a CUDA graph is captured before the projection was used on this device: what it keeps there would be made "
            "in the graph's memory. Run forward and backward once before the capture, as a warm-up"
        )
    made = ordinary(make)
    torch.cuda.synchronize(device)
    return made


@torch.compiler.assume_constant_result
def _constant_operands(
    projection: Projection, device: torch.device, ranges: Sequence[Range], dtype: torch.dtype
) -> tuple[Any, ...]:
    """What some rows are computed from, made for real while a graph is traced, and constants of that graph."""
    recorder = torch._C._get_tracing_state()  # of torch.jit.trace
    torch._C._set_tracing_state(None)
    try:
        with _disable_current_modes():
            return projection.restrict(device, ranges).operands(dtype)
    finally:
        torch._C._set_tracing_state(recorder)
