"""The errors of this package. Each message names what was wrong, what was expected and what was given."""

__all__ = ["AdapterFileError", "AttachError", "UniLoRAError", "shown"]


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
