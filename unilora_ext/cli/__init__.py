"""The command ``unilora``. Exit status: 0, 1 for work that failed, 2 for wrong input, 130 for an interruption."""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from unilora_ext.cli.errors import AgreedError, CliError, RunError
from unilora_ext.cli.parser import make_parser, parse
from unilora_ext.errors import UniLoRAError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one sub-command.

    Args:
        arguments: of the command line; default: ``sys.argv[1:]``.

    Returns:
        The exit status.
    """
    parser = make_parser()
    given = parse(parser, arguments)
    name = given.command
    if name is None:
        parser.print_help()
        return 0
    module, function = given.run.split(":")
    del given.command, given.run
    if isinstance(sys.stdout, io.TextIOWrapper):  # a text that the terminal's encoding lacks is shown as \\u....
        sys.stdout.reconfigure(errors="backslashreplace")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else a fork (a data loader's) draws a warning
    try:
        # A sub-command's module is imported when it runs: --help need not wait for Transformers.
        getattr(importlib.import_module(module), function)(given)
        print(end="", flush=True)
    except AgreedError as error:
        return error.status
    except (CliError, UniLoRAError) as error:
        return _fail(name, error, 2)
    except (RunError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # the reader of our output has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        return _fail(name, error, 1)
    except KeyboardInterrupt:
        return 130
    return 0


def _fail(name: str, error: BaseException, status: int) -> int:
    with suppress(OSError):  # standard output may be what failed
        print(end="", flush=True)
    with suppress(OSError):
        print(f"unilora {name}: error: {error}", file=sys.stderr, flush=True)
    return status
