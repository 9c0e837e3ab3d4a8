"""``adapter.json``: what an adapter's record must say, checked the same way when it is written and when it is read.

A record is a JSON value; the types below are its schema. Nothing is converted: a number in quotes is an error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import msgspec

from unilora_ext._native import _C
from unilora_ext.config import UniLoRAConfig, size_of
from unilora_ext.errors import AdapterFileError, UniLoRAError, shown
from unilora_ext.layout import Layout
from unilora_ext.projections import Projection, projection_class

__all__ = ["ENTRY", "FORMAT", "FORMAT_VERSION", "check_json", "conform", "digest", "parse", "parse_json"]

ENTRY = "adapter.json"
FORMAT = "unilora_ext adapter"
FORMAT_VERSION = 2
MOST_BYTES = 64 << 20
"""Of a JSON file: names and shapes of some 500,000 modules."""
MOST_LEVELS = 100
"""Of nesting: what is written at any depth of calls can be read at any other."""
MOST_BITS = 1024
"""Of an integer: as large as a float can be. Python refuses to print or read very long ones."""

# ---- the schema -----------------------------------------------------------------------------------------------------

_Size = Annotated[int, msgspec.Meta(ge=1, le=_C.max_elements)]
_Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


class _Strict(msgspec.Struct, forbid_unknown_fields=True):
    pass


class _Projection(_Strict):
    name: str
    version: int
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
    options: dict[str, Any]


class _File(_Strict):
    name: Annotated[str, msgspec.Meta(pattern=r"^(theta_d|modules_to_save)-[0-9a-f]{8,64}\.safetensors\Z")]
    bytes: Annotated[int, msgspec.Meta(ge=0)]
    sha256: _Sha256


class _Files(_Strict):
    theta_d: _File
    modules_to_save: _File | msgspec.UnsetType = msgspec.UNSET


_hints = get_type_hints(UniLoRAConfig)
_Config = msgspec.defstruct(
    "_Config",
    [
        (f.name, dict[str, Any]) if f.name == "projection_options" else (f.name, _hints[f.name], f.default)
        for f in fields(UniLoRAConfig)
    ],
    bases=(_Strict,),
    kw_only=True,
)


class _Record(_Strict):
    format: Literal[FORMAT]
    format_version: Literal[1, FORMAT_VERSION]
    library_version: str
    projection: _Projection
    d: _Size
    D: Annotated[int, msgspec.Meta(ge=1, le=1 << 53)]
    r: _Size
    scaling: float
    layout: str
    modules: Annotated[list[tuple[str, _Size, _Size]], msgspec.Meta(min_length=1)]  # name, m, n
    fingerprint: _Sha256
    config: _Config
    base_model: str | None
    metadata: dict[str, Any]
    files: _Files


# ---- reading --------------------------------------------------------------------------------------------------------


def parse(data: bytes, path: Path) -> tuple[dict[str, Any], UniLoRAConfig]:
    """The record, without its checksum, and the configuration in it: in the terms of this version, whichever it was
    written in (``format_version``).

    Args:
        data: the content of ``adapter.json``.
        path: of it, for messages.

    Raises:
        AdapterFileError: it is no such record, of another version, changed by hand, or contradicts itself.
    """
    record = parse_json(data, path)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        got = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise AdapterFileError(f"{path}: expected format '{FORMAT}', got {shown(got)}")
    if record.get("format_version") not in (1, FORMAT_VERSION):
        raise AdapterFileError(
            f"{path}: expected format version {FORMAT_VERSION} or 1, got {shown(record.get('format_version'))}; "
            f"it was written by unilora_ext {record.get('library_version')!s:.40}, this is {_C.version}"
        )
    stated = record.pop("checksum", None)
    if stated != digest(record):
        raise AdapterFileError(f"{path}: the content does not match its checksum: it was changed after it was saved")
    if record["format_version"] == 1:
        _upgrade(record, path)
    conform(record, _Record, path)
    try:
        config = UniLoRAConfig(**record["config"])
        kind = projection_class(config.projection)
    except UniLoRAError as error:
        raise AdapterFileError(f"{path}: config: {error}") from error
    _check_agreement(record, config, kind, path)
    return record, config


def _upgrade(record: dict[str, Any], path: Path) -> None:
    """A record of version 1, whose projections had no options, in the terms of version 2."""
    for part, name in (("projection", "options"), ("config", "projection_options")):
        values = record.get(part)
        if isinstance(values, dict):  # else the schema says what is wrong
            if name in values:
                raise AdapterFileError(f"{path}: {part}: object contains unknown field '{name}'")
            values[name] = {}


def _check_agreement(record: Mapping[str, Any], config: UniLoRAConfig, kind: type[Projection], path: Path) -> None:
    """Agreement of the record with itself: a writer's mistake otherwise, since the checksum holds."""
    projection, modules = record["projection"], record["modules"]
    version, layout = projection["version"], Layout(tuple((m, n) for _, m, n in modules), config.r, kind.order)
    try:
        options, size = kind.checked_options(projection["options"]), size_of(config, layout)
    except UniLoRAError as error:
        raise AdapterFileError(f"{path}: projection: {error}") from error
    stated = {  # what it says, and what follows
        "projection.version": (version, version if version in kind.versions else kind.versions[-1]),
        "projection.name": (projection["name"], config.projection),
        "projection.seed": (projection["seed"], config.seed),
        "projection.options": (options, kind.checked_options(config.projection_options)),
        "layout": (record["layout"], layout.order.value),
        "d": (record["d"], config.d),
        "r": (record["r"], config.r),
        "scaling": (record["scaling"], config.scaling),
        "D": (record["D"], layout.D),
        "number of different module names": (len({name for name, _, _ in modules}), len(modules)),
        "fingerprint": (record["fingerprint"], digest(modules)),
    }
    for name, (got, expected) in stated.items():
        if got != expected:
            raise AdapterFileError(f"{path}: {name}: expected {shown(expected)}, got {shown(got)}")
    if size is not None and record["d"] != size:
        raise AdapterFileError(f"{path}: d: expected {size}, which the sizes give, got {record['d']}")
    if size is None and record["d"] > layout.D:
        raise AdapterFileError(f"{path}: d: expected at most D = {layout.D}, got {record['d']}")


def parse_json(data: bytes, path: Path) -> Any:
    """A JSON value.

    Args:
        data: UTF-8.
        path: where it is from, for messages.

    Raises:
        AdapterFileError: it is not JSON, or of a kind that programs read differently: a name given twice, a number
            that is not finite, a lone surrogate, nesting without end.
    """
    if len(data) > MOST_BYTES:
        raise AdapterFileError(f"{path}: expected at most {MOST_BYTES} bytes of JSON, got {len(data)}")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_constant)
        check_json(value, "the value", MOST_LEVELS + 1)  # one more than the metadata inside
    except (ValueError, RecursionError) as error:  # of these: UnicodeDecodeError, JSONDecodeError, UniLoRAError
        raise AdapterFileError(f"{path}: expected JSON, the file is truncated or damaged ({error})") from error
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError(f"a name is given twice in {shown([name for name, _ in pairs])}")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def conform(value: Any, schema: Any, path: Path) -> Any:
    """A JSON value as a type that it must have; nothing is converted.

    Raises:
        AdapterFileError: it has another; the message names the field, what was expected and what came.
    """
    try:
        return msgspec.convert(value, schema, strict=True)
    except msgspec.ValidationError as error:
        what, _, where = str(error).replace("`", "'").partition(" - at '$")
        field = where.rstrip("'").lstrip(".") or "the record"
        raise AdapterFileError(f"{path}: {field}: {what[0].lower()}{what[1:]}") from error


# ---- writing --------------------------------------------------------------------------------------------------------


def check_json(value: Any, where: str, levels: int = MOST_LEVELS) -> None:
    """Checks that JSON keeps a value as it is (a tuple becomes a list).

    Raises:
        UniLoRAError: the message names the part that JSON would change or cannot hold.
    """
    if levels == 0:
        raise UniLoRAError(f"{where}: expected at most {MOST_LEVELS} levels of nesting, got more")
    if isinstance(value, dict):
        for key, part in value.items():
            if not isinstance(key, str):
                raise UniLoRAError(
                    f"{where}: expected strings as keys, which JSON makes of all of them; got {shown(key)}"
                )
            _check_text(key, where)
            check_json(part, f"{where}[{shown(key)}]", levels - 1)
    elif isinstance(value, (list, tuple)):
        for part in value:
            check_json(part, where, levels - 1)
    elif isinstance(value, str):
        _check_text(value, where)
    elif isinstance(value, float) and value - value != 0:  # infinite or not a number
        raise UniLoRAError(f"{where}: expected a finite number, got {value}")
    elif isinstance(value, int) and value.bit_length() > MOST_BITS:
        raise UniLoRAError(f"{where}: expected an integer of at most {MOST_BITS} bits, got {value.bit_length()}")
    elif value is not None and not isinstance(value, (bool, int, float)):
        raise UniLoRAError(f"{where}: expected a JSON value, got {shown(value)} ({type(value).__name__})")


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UniLoRAError(f"{where}: expected Unicode text, got {shown(text)} ({error.reason})") from error


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, independent of spacing and key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
