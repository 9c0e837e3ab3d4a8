"""``unilora bench``: the benchmarks of a source checkout."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

from unilora_ext.cli.errors import CliError, RunError

__all__ = ["command"]


def command(arguments: Namespace) -> None:
    """Runs ``run.py`` of the folder in a process of its own.

    Raises:
        CliError: there is no such folder.
        RunError: the benchmarks failed.
    """
    script = Path(arguments.folder) / "run.py"
    if not script.is_file():
        raise CliError(
            f"--folder: expected the folder 'benchmarks' of a source checkout, with run.py; got {arguments.folder}"
        )
    status = subprocess.call([sys.executable, str(script), *arguments.arguments])
    if status != 0:
        raise RunError(f"{script} ended with status {status}")
