"""Records for a causal language model: a text, a prompt with its completion, or a conversation."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unilora_ext.cli.errors import CliError
from unilora_ext.cli.files import TextFormat, as_json, encoded, read_records, shown

__all__ = ["Record", "read_conversations", "split_conversations", "write_conversations"]


@dataclass(frozen=True)
class Record:
    """What a model is to say; where it came from.

    Attributes:
        fields: ``{"text"}`` (all of it is learnt), ``{"prompt", "completion"}`` (the completion is) or ``{"messages"}``
            (the assistant's turns are). A prompt and messages may come alone where they are to be answered.
        where: file and line.
    """

    fields: dict[str, Any]
    where: str


def read_conversations(
    path: str | Path,
    text_column: str,
    answered: bool = True,
    form: TextFormat = TextFormat(),  # noqa: B008 (frozen)
) -> list[Record]:
    """All records of a file, checked.

    Args:
        path: ``.jsonl`` with objects of any of the three kinds, ``.csv`` or ``.tsv`` with a text column, or ``.txt``
            with one text a line. Other keys are left out.
        text_column: name of the key or column of texts.
        answered: whether a completion, or an assistant's turn, must be there.
        form: encoding and separator of the file.

    Raises:
        CliError: naming the file, the line, what was expected and what came.
    """
    columns = () if Path(path).suffix.lower() == ".jsonl" else (text_column,)
    found = read_records(path, (".jsonl", ".csv", ".tsv", ".txt"), columns, form)
    records = [Record(_fields(where, record, text_column, answered), where) for where, record in found]
    if not records:
        raise CliError(f"{path}: expected at least one record, got none")
    return records


def _fields(where: str, record: dict[str, Any], text_column: str, answered: bool) -> dict[str, Any]:
    kinds = [key for key in (text_column, "prompt", "messages") if key in record]
    if len(kinds) != 1:
        raise CliError(
            f"{where}: expected one of the keys '{text_column}', 'prompt' (with 'completion') and 'messages', "
            f"got {kinds or list(record)}"
        )
    if kinds == ["messages"]:
        return {"messages": _messages(where, record["messages"], answered)}
    names = kinds + (["completion"] if kinds == ["prompt"] and (answered or "completion" in record) else [])
    if answered and names[-1] not in record:
        raise CliError(f"{where}: expected a key 'completion' beside 'prompt', got {list(record)}")
    for name in names:
        if not isinstance(record[name], str) or not record[name].strip():
            raise CliError(f"{where}: '{name}': expected a text, got {shown(record[name])}")
    return {"text" if name == text_column else name: record[name] for name in names}


def _messages(where: str, messages: Any, answered: bool) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise CliError(f"{where}: 'messages': expected a list of messages, got {shown(messages)}")
    for number, message in enumerate(messages, 1):
        place = f"{where}: message {number}"
        if not isinstance(message, dict):
            raise CliError(f"{place}: expected an object with 'role' and 'content', got {shown(message)}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str) or (key == "role" and not message[key]):
                raise CliError(f"{place}: '{key}': expected a text, got {shown(message.get(key))}")
    if answered and not any(message["role"] == "assistant" and message["content"] for message in messages):
        raise CliError(f"{where}: 'messages': expected a turn of the role 'assistant', got none")
    return messages


def split_conversations(records: Sequence[Record], fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """(training, validation), drawn by `seed`.

    Raises:
        CliError: a single record.
    """
    if len(records) < 2:
        raise CliError(f"{records[0].where}: expected at least 2 records, one to train and one to validate, got 1")
    order = list(range(len(records)))
    random.Random(seed).shuffle(order)
    held_out = set(order[: min(len(records) - 1, max(1, round(fraction * len(records))))])
    training = [record for i, record in enumerate(records) if i not in held_out]
    return training, [record for i, record in enumerate(records) if i in held_out]


def write_conversations(path: Path, records: Sequence[Record], text_column: str) -> None:
    """Writes a .jsonl that :func:`read_conversations` reads back unchanged."""
    with open(path, "wb") as file:
        for record in records:
            renamed = {text_column if key == "text" else key: value for key, value in record.fields.items()}
            file.write(encoded(as_json(renamed, indent=None)))
