"""The paper's experiments by name, with their published settings, and ``unilora recipes``, which shows them."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from unilora_ext.cli.errors import CliError, closest
from unilora_ext.cli.files import as_json

__all__ = ["HubData", "Recipe", "command", "find", "recipes"]


@dataclass(frozen=True)
class HubData:
    """A data set of the hub.

    Attributes:
        hub: its name there.
        splits: the split, as ``datasets`` spells it, for the settings ``data``, ``validation`` and ``test``.
        config: name of its configuration, if it has several.
        prompts: templates over its columns; a row takes the first whose columns it fills.
        completion: the template of what is learnt; empty: rows are taken as they are.
    """

    hub: str
    splits: dict[str, str]
    config: str | None = None
    prompts: tuple[str, ...] = ()
    completion: str = ""


@dataclass(frozen=True)
class Recipe:
    """One experiment.

    Attributes:
        name: for ``--recipe``.
        about: what its family of experiments is.
        settings: all that were published, by the names of :class:`~unilora_ext.cli.settings.Settings`.
        data: what it trains on.
        sources: where each number was published.
        expected: ``figure``, ``value`` and ``source`` of the published score, where it is known.
    """

    name: str
    about: str
    settings: dict[str, Any]
    data: HubData
    sources: dict[str, str]
    expected: dict[str, Any] | None


@cache
def recipes() -> dict[str, Recipe]:
    """All, by name. In a file of ``recipes/``, an experiment's own settings come before those of its data, of its model
    and of the family."""
    found = {}
    for file in sorted(resources.files(__package__).joinpath("recipes").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".json"):
            family = json.loads(file.read_text(encoding="utf-8"))
            found.update({name: _recipe(name, family) for name in family["recipes"]})
    return found


def _recipe(name: str, family: dict[str, Any]) -> Recipe:
    own = family["recipes"][name]
    model, data = family["models"][own["model"]], dict(family["data"][own["data"]])
    parts = (family.get("settings"), model.get("settings"), data.pop("settings", None), own.get("settings"))
    settings = {key: value for part in parts for key, value in (part or {}).items()}
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    data["prompts"] = tuple(data.get("prompts", ()))
    return Recipe(
        name,
        family["about"],
        {"model": model["model"], **settings},
        HubData(**data),
        family["sources"],
        own.get("expected"),
    )


def find(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        CliError: there is none.
    """
    if name not in recipes():
        raise CliError(
            f"--recipe: expected one of the names that 'unilora recipes' lists, got {name!r}{closest(name, recipes())}"
        )
    return recipes()[name]


def command(arguments: Namespace) -> None:
    """``unilora recipes``: a table of all, or all that is known of one as JSON."""
    if arguments.name is not None:
        recipe = find(arguments.name)
        print(
            as_json(
                {
                    "recipe": recipe.name,
                    "settings": recipe.settings,
                    "data": {key: value for key, value in vars(recipe.data).items() if value},
                    "expected": recipe.expected,
                    "sources": recipe.sources,
                }
            ),
            end="",
        )
        return
    rows = [("recipe", "model", "data", "d", "to compare with")]
    for recipe in recipes().values():
        data, expected = recipe.data, recipe.expected
        score = f"{expected['figure']} {expected['value']:.4g}" if expected else "-"
        rows.append(
            (
                recipe.name,
                recipe.settings["model"],
                " ".join(filter(None, (data.hub, data.config))),
                f"{recipe.settings['d']:,}",
                score,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)).rstrip())
    print("\nrun one: unilora finetune --recipe NAME; all of its settings and their sources: unilora recipes NAME")
