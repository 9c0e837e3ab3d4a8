"""The errors of this package. Each message names what was wrong, what was expected and what was given."""

__all__ = ["AdapterFileError", "AttachError", "UniLoRAError"]


class UniLoRAError(ValueError):
    """Base class. A call that raises one has changed nothing."""


class AttachError(UniLoRAError):
    """The adapter does not fit the model."""


class AdapterFileError(UniLoRAError):
    """An adapter folder is missing, truncated, tampered with, of another format, or made for another model."""
