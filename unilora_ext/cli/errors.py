"""The error of the command line, and checks that raise it."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable

from unilora_ext.errors import UniLoRAError

__all__ = ["AgreedError", "CliError", "RunError", "closest", "need"]


class CliError(UniLoRAError):
    """Wrong input: what, where, what was expected, what came. Nothing has been changed."""


class RunError(RuntimeError):
    """Good input, but the work failed: exit status 1."""


class AgreedError(Exception):
    """Another process of the run reports the error; this one ends silently with the same exit status."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


_EXTRAS = {
    "transformers": "train",
    "accelerate": "train",
    "matplotlib": "train",
    "sklearn": "demo",
    "gguf": "gguf",
    "bitsandbytes": "recipes",
    "datasets": "recipes",
    "PIL": "recipes",
}


def need(*modules: str) -> None:
    """Checks that optional packages are installed, without importing them.

    Raises:
        CliError: naming the missing packages and the command that installs them.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        extra = max((_EXTRAS[name] for name in missing), key=("train", "recipes", "gguf", "demo").index)
        raise CliError(
            f"expected the Python package{'s' * (len(missing) > 1)} {', '.join(missing)}, got no such package; "
            f'install with: pip install "unilora-ext[{extra}]"'
        )


def closest(name: str, names: Iterable[str]) -> str:
    """``"; did you mean 'x'?"``, or nothing where no name is close."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""
