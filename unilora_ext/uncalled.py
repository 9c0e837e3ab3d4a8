"""Layers that a model reads and does not call: an update in their forward would have no effect.

Parents known to do so are listed here and refused (:func:`reads_weight`), one that does so in evaluation alone is kept
from it (:func:`keep_called`), and the rest is found in the first forward with gradients (:class:`CallWatch`).
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import nn

from unilora_ext.functional import graph_is_traced
from unilora_ext.shared_vector import SharedVector

__all__ = ["CallWatch", "extends_forward", "keep_called", "keeps_called", "mentions_weight", "reads_weight"]

logger = logging.getLogger("unilora_ext")

_READ_IN_TRANSFORMERS = {
    "ConditionalDetrMHAttentionMap": ("k_proj",),  # a convolution
    "DabDetrMHAttentionMap": ("k_linear",),
    "DetrMHAttentionMap": ("k_proj",),
    "MaskFormerDetrMHAttentionMap": ("k_proj",),
    "TDNNLayer": ("kernel",),
    "FalconMambaMixer": ("dt_proj",),  # dt_proj.weight @ time_step
    "JambaMambaMixer": ("dt_proj",),
    "MambaMixer": ("dt_proj",),
    "Gemma3nTextAltUp": ("correction_coefs",),  # clipped in training
    "LayoutLMv2Encoder": ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"),  # tables
    "LayoutLMv3Encoder": ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"),
    "PPDocLayoutV2ReadingOrderEncoder": ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"),
    "LongcatFlashTopkRouter": ("classifier",),  # in float32
    "LSHSelfAttention": ("query_key", "value"),  # a head at a time, when decoding with a cache
    "MobileBertLMPredictionHead": ("decoder", "dense"),  # joined
    "NeoMMEForMaskedLM": ("unembedding_projection",),  # transposed
    "WavLMAttention": ("k_proj", "out_proj", "q_proj", "v_proj"),  # F.multi_head_attention_forward
}
"""Modules of Transformers, by class, and the linear children whose weight they read."""

_READ_BY_KERNELS = {
    "BambaMixer": ("out_proj",),
    "FalconH1Mixer": ("out_proj",),
    "FalconMambaMixer": ("out_proj", "x_proj"),
    "GraniteMoeHybridMambaLayer": ("out_proj",),
    "Mamba2Mixer": ("out_proj",),
    "MambaMixer": ("out_proj", "x_proj"),
    "NemotronHMamba2Mixer": ("out_proj",),
    "Zamba2MambaMixer": ("out_proj",),
}
"""The same, where the fused kernels of ``mamba_ssm`` are installed, in training: without them and in evaluation the
layers are called, so that what acts then was never trained."""

_CALL_WHEN_QUANTISED = {"FalconMambaMixer", "JambaMambaMixer"}


def reads_weight(parent: nn.Module | None, child: str) -> str | None:
    """The class of `parent` that reads the weight of its layer `child` instead of calling it, and when if not always;
    None: not known to."""
    if isinstance(parent, nn.MultiheadAttention):
        return "torch.nn.MultiheadAttention"
    if type(parent).__name__ == "HQQLinear" and child == "linear_layer":  # the original, kept with del_orig=False
        return "HQQLinear"
    for cls in type(parent).__mro__:
        if not cls.__module__.startswith("transformers."):
            continue
        if child in _READ_BY_KERNELS.get(cls.__name__, ()):
            return f"{cls.__name__}, in training with fused kernels,"
        if child in _READ_IN_TRANSFORMERS.get(cls.__name__, ()):
            quantised = hasattr(getattr(parent, "config", None), "_is_quantized")
            return None if quantised and cls.__name__ in _CALL_WHEN_QUANTISED else cls.__name__
    return None


def mentions_weight(module: nn.Module, path: str) -> str | None:
    """The class of `module` whose source has ``self.<path>.weight`` for more than its dtype, device or shape, outside
    what makes, ties or resizes it; None: none has. For embeddings and convolutions, whose weights so many models read
    that no list could hold them."""
    read = _reading_of(f"self.{path}.weight")
    return next((cls.__name__ for cls in type(module).__mro__ if read.search(_source_of(cls))), None)


def extends_forward(cls: type[nn.Module], base: type[nn.Module]) -> bool:
    """Whether a subclass of `base` leaves what its weight does to the forward of `base`: it has none of its own, or one
    whose source calls ``super().forward`` and does not read ``self.weight``."""
    read = _reading_of("self.weight")
    for part in cls.__mro__[: cls.__mro__.index(base)]:
        source = _source_of(part)
        if ("forward" in vars(part) and "super().forward(" not in source) or read.search(source):
            return False
    return True


def _reading_of(weight: str) -> re.Pattern[str]:
    """Matches what is done with an expression but for asking its dtype, device or shape."""
    unread = "dtype|device|shape|size|dim|ndim|numel|is_meta"
    return re.compile(rf"\b{re.escape(weight)}\b(?!\.({unread})\b)")


@cache
def _source_of(cls: type) -> str:
    """The source of a class's functions, without those that make, tie or resize weights; of PyTorch's own: nothing."""
    if cls.__module__.startswith("torch.") or cls is object:
        return ""
    parts = []
    for name, function in vars(cls).items():
        function = inspect.unwrap(getattr(function, "__func__", function))
        if inspect.isfunction(function) and not re.search("init|tie|resize|reset", name):
            with suppress(OSError, TypeError, SyntaxError):  # made at run time
                parts.append(inspect.getsource(function))
    return "\n".join(parts)


# ---- evaluation of torch.nn.TransformerEncoder ----------------------------------------------------------------------


class Handle(Protocol):
    """Something that is undone by `remove`."""

    def remove(self) -> None: ...


@dataclass
class _DenseEncoder:
    """A ``torch.nn.TransformerEncoder`` kept from nested tensors, which only its fused layers can take."""

    encoder: nn.TransformerEncoder

    def __post_init__(self) -> None:
        self.encoder.use_nested_tensor = False

    def remove(self) -> None:
        self.encoder.use_nested_tensor = True


def keep_called(model: nn.Module, names: Iterable[str]) -> Iterator[Handle]:
    """Keeps the layers `names` called where ``torch.nn.TransformerEncoderLayer`` would read their weights, which it
    does in evaluation unless a module inside has a forward hook."""
    modules = dict(model.named_modules())
    for name in names:
        above = name
        while above:
            above = above.rpartition(".")[0]
            parent = modules[above]
            if isinstance(parent, nn.TransformerEncoder) and getattr(parent, "use_nested_tensor", False):
                yield _DenseEncoder(parent)
            if isinstance(parent, nn.TransformerEncoderLayer):
                yield modules[name].register_forward_hook(keeps_called)


def keeps_called(module: nn.Module, args: Any, output: Any) -> None:
    """A forward hook that does nothing: its presence keeps a fused parent from reading the weight instead."""


# ---- the first forward with gradients -------------------------------------------------------------------------------


class CallWatch:
    """Names the adapted layers that a model did not call in its first whole forward with gradients, in one warning.

    After that forward its two hooks are gone.

    Args:
        model: adapted with `vector`.
        vector: which layers ask for their factors.
    """

    def __init__(self, model: nn.Module, vector: SharedVector) -> None:
        self.vector = vector
        self.handles: list[Handle] = [
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._end),  # not called after a forward that raised
        ]

    def remove(self) -> None:
        self.vector.asked = None
        for handle in self.handles:
            handle.remove()

    def _watching(self) -> bool:
        """Not in a graph that is traced, and only where every layer would ask: not while off or merged."""
        vector = self.vector
        return not graph_is_traced() and torch.is_grad_enabled() and vector.enabled and vector.theta_d.requires_grad

    def _begin(self, model: nn.Module, args: Any) -> None:
        if self.vector.asked is None and self._watching():  # else a thread beside this one has begun
            self.vector.asked = set()

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        asked = self.vector.asked
        if asked is None or not self._watching():
            return
        self.remove()
        unseen = {id(part) for module in model.modules() if _is_compiled(module) for part in module.modules()}
        uncalled = []
        for name, module in model.named_modules():
            state = module.__dict__.get("_unilora")
            ours = state is not None and state.vector is self.vector and state.original is None
            if ours and state.slot_id not in asked and id(module) not in unseen:
                uncalled.append(name)
        if uncalled:
            logger.warning(
                "%d of %d adapted layers were not called in this forward, the first with gradients: %s. A layer that "
                "is not called adds no update and gives theta_d no gradient, but merge() would change its weight. This "
                "is as it should be for an expert without a token or a part that this input does not need; where the "
                "model reads the weight instead, as F.linear(x, layer.weight) does, leave the layer out of "
                "target_modules",
                len(uncalled),
                len(self.vector.slots),
                _listed(uncalled),
            )


def _is_compiled(module: nn.Module) -> bool:
    """Whether a module runs as a graph of its own, inside which no call is seen."""
    return module._compiled_call_impl is not None or hasattr(module.forward, "_torchdynamo_orig_callable")


def _listed(names: list[str], most: int = 20) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"'{name}'" for name in names[:most]) + more
