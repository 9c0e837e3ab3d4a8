"""Pages of the site that lie elsewhere in the repository, and the options of the command line."""

from __future__ import annotations

import argparse
import importlib
import posixpath
import re
import sys
import types
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
ELSEWHERE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "kernels.md": "benchmarks/NOTES.md",
    "LICENSE": "LICENSE",
    **{f"results/{path.name}": f"benchmarks/results/{path.name}" for path in ROOT.glob("benchmarks/results/*.png")},
}
"""Path in the repository, by path in the site."""

_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")


def on_files(files, config):
    for name, path in ELSEWHERE.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    name = page.file.src_uri
    source = ELSEWHERE.get(name, f"docs/{name}")
    markdown = _LINK.sub(lambda link: _in_site(link[1], source, name), markdown)
    return markdown.replace("<!-- options -->", _options()) if name == "command-line.md" else markdown


def _in_site(target: str, source: str, page: str) -> str:
    """A relative link of the repository's file `source` as one of the site's `page`."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    name = next((name for name, other in ELSEWHERE.items() if other == path), path.removeprefix("docs/"))
    return posixpath.relpath(name, posixpath.dirname(page) or ".")


def _options() -> str:
    """The sub-commands, each with its arguments, from the parser."""
    # The parser's own modules need neither torch nor the compiled library, which the package's __init__ loads.
    package = types.ModuleType("unilora_ext")
    package.__path__ = [str(ROOT / "unilora_ext")]
    sys.modules["unilora_ext"] = package
    parser = importlib.import_module("unilora_ext.cli.parser").make_parser()
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return "\n".join(line for name, command in commands.choices.items() for line in _command(name, command))


def _command(name: str, parser: argparse.ArgumentParser) -> list[str]:
    formatter = parser._get_formatter()
    rows = []
    for action in parser._actions:
        if not isinstance(action, argparse._HelpAction):
            argument = formatter._format_action_invocation(action)
            help_ = formatter._expand_help(action) if action.help else "required" if action.required else ""
            rows.append(f"| `{argument}` | {help_} |".replace("\n", " "))
    return [f"### unilora {name}", "", parser.description, "", "| option | |", "| --- | --- |", *rows, ""]
