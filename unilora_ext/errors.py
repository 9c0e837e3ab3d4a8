"""The errors of this package. Each message names what was wrong, what was expected and what was given."""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["AdapterFileError", "AttachError", "UniLoRAError", "naming", "shown"]


class UniLoRAError(ValueError):
    """Base class. A call that raises one has changed nothing."""


class AttachError(UniLoRAError):
    """The adapter does not fit the model."""


class AdapterFileError(UniLoRAError):
    """An adapter folder is missing, truncated, tampered with, of another format, or made for another model."""


def shown(value: object) -> str:
    """A value in an error message, cut short."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deep; an integer of too many digits
        return f"{type(value).__name__} too large to show"
    return text if len(text) <= 200 else text[:197] + "..."


@contextmanager
def naming(layer: str) -> Iterator[None]:
    """Adds the name of the layer to an error."""
    try:
        yield
    except UniLoRAError as error:
        raise UniLoRAError(f"{error} (layer '{layer}')") from None
