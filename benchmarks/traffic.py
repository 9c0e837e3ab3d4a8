"""The bytes that a process gives to collectives: exact, whatever the machine. The tests count with it too."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Traffic(TorchDispatchMode):
    """What this process gives to collectives while the mode is on::

        with Traffic() as traffic:
            model(batch).loss.backward()
        traffic.bytes                                    # {"allgather": [...], "allreduce": [4 * d]}

    Attributes:
        bytes: by kind of collective, the size of the larger of input and output of each call, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, list[int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        namespace, _, name = str(function.name()).partition("::")
        if "c10d" in namespace and "wait" not in name:
            kind = name.partition(".")[0].strip("_").removesuffix("_base").replace("all_", "all")
            if not kind.startswith("wrap"):
                tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
                self.bytes.setdefault(kind, []).append(max(t.nbytes for t in tensors))
        return function(*args, **(kwargs or {}))
