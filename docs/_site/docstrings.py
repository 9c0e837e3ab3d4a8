"""Docstrings as Markdown: what Python's interactive help shows as it is, the site shows as references and code."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`[~.]?([\w.]+)`")


class Markdown(griffe.Extension):
    """``:func:`name` `` becomes a reference where the site has `name`; the two colons before code become one."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = _ROLE.sub(lambda role: _reference(obj, role[1]), obj.docstring.value)
            obj.docstring.value = re.sub(r"::(?=\n\n)", ":", text)


def _reference(obj: griffe.Object, name: str) -> str:
    shown = name.rpartition(".")[2] if name.startswith("unilora_ext.") else name
    return f'<autoref identifier="{_resolved(obj, name)}" optional><code>{shown}</code></autoref>'


def _resolved(obj: griffe.Object, name: str) -> str:
    for scope in (obj, obj.parent):
        if scope is not None:
            try:
                return scope.resolve(name)
            except griffe.NameResolutionError:
                continue
    return name
