"""``unilora evaluate`` (any task) and ``unilora predict`` (encoders): a saved adapter on rows or texts."""

from __future__ import annotations

import csv
import io
import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unilora_ext.checkpoint import read
from unilora_ext.cli.conversations import read_conversations
from unilora_ext.cli.data import Row, read_rows, read_table
from unilora_ext.cli.errors import CliError, need
from unilora_ext.cli.files import TextFormat, as_json, check_unicode
from unilora_ext.cli.outputs import check_target, write
from unilora_ext.cli.settings import CAUSAL_LM, CLASSIFICATION, ENCODERS, REGRESSION, check_task

__all__ = ["describe", "evaluate", "predict"]

ADDED = ("prediction", "probability")
"""Columns of a file that ``unilora predict`` writes, after those it has read."""
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def evaluate(arguments: Namespace) -> None:
    """Prints the loss and the task's figures to the last digit."""
    need("transformers")
    facts = read(arguments.adapter).metadata
    (text, label), form = _columns(arguments, facts), TextFormat.of(arguments)
    if facts.get("task") == CAUSAL_LM:
        if arguments.label_column is not None:
            raise CliError(
                f"--label-column: expected for {' or '.join(ENCODERS)} only, the adapter's task is {CAUSAL_LM}"
            )
        rows = read_conversations(arguments.data, text, form=form)
    else:
        numbers = facts.get("task") == REGRESSION
        pair = facts.get("text_pair_column")
        rows = read_rows(arguments.data, text, label, facts.get("labels", ()), form, pair, numbers)
    check_target(arguments.json, arguments.data)

    from unilora_ext.cli.tasks import load_on

    task, _ = load_on(arguments.adapter, arguments.model, arguments.device)
    ready, counts = task.ready(rows)
    result = task.score(ready)
    print("\n".join(result.lines()))
    if counts:
        print("data     " + describe(counts))
    if arguments.json is not None:
        record = {"adapter": str(arguments.adapter), "data": str(arguments.data), **result.asdict()}
        if counts:
            record["records"] = counts
        write(arguments.json, as_json(record))


def predict(arguments: Namespace) -> None:
    """Prints a label and its probability a line, or a number; or writes a file: what was read, and these in columns of
    their own."""
    need("transformers")
    facts = read(arguments.adapter).metadata
    numbers = facts.get("task") == REGRESSION
    task = facts["task"] if facts.get("task") in ENCODERS else CLASSIFICATION
    check_task(arguments.adapter, facts, task, "unilora generate")
    if (arguments.text is None) == (arguments.data is None):
        got = "neither" if arguments.text is None else "both"
        raise CliError(f"--text, --data: expected one of them, got {got}")
    if arguments.text is not None and facts.get("text_pair_column"):
        raise CliError(
            "--text: expected --data with the columns of both texts, the adapter was trained on pairs "
            f"('{facts['text_column']}' and '{facts['text_pair_column']}')"
        )
    output = arguments.output
    if output is not None and Path(output).suffix.lower() not in (*_DELIMITERS, ".jsonl"):
        raise CliError(
            f"--output {output}: expected a name that ends in .csv, .tsv or .jsonl, got '{Path(output).name}'"
        )
    check_target(output, arguments.data, "--output")
    if arguments.data is not None:
        text, pair = _columns(arguments, facts)[0], facts.get("text_pair_column")
        rows, records = read_table(arguments.data, text, TextFormat.of(arguments), pair)
        taken = [name for name in ADDED if any(name in record for record in records)]
        if output is not None and taken:
            raise CliError(
                f"{arguments.data}: expected no column '{taken[0]}', which is added to those of the data in --output; "
                "rename it or take it out"
            )
    else:
        rows = [Row(text, None, f"--text number {i}") for i, text in enumerate(arguments.text, 1)]
        for row in rows:
            check_unicode(row.text, row.where)
        empty = [row.where for row in rows if not row.text.strip()]
        if empty:
            raise CliError(f"{empty[0]}: expected a text, got nothing")
        records = [{"text": row.text} for row in rows]

    from unilora_ext.cli.classifier import logits
    from unilora_ext.cli.tasks import load_on

    classifier, _ = load_on(arguments.adapter, arguments.model, arguments.device)
    classifier.ready(rows)
    values = logits(classifier, rows)
    if numbers:
        found = values.tolist()
    else:
        best = values.softmax(-1).max(-1)
        found = [[classifier.labels[i], p] for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    if output is None:
        for row, answer in zip(rows, found, strict=True):
            shown = [value if isinstance(value, str) else f"{value:.4f}" for value in answer]
            print("\t".join([*shown, *(" ".join(text.split()) for text in row.texts)]))
    else:
        records = [
            {**record, **dict(zip(ADDED[: len(answer)], answer, strict=True))}
            for record, answer in zip(records, found, strict=True)
        ]
        write(output, _text(records, Path(output).suffix.lower(), ADDED[: len(found[0])]))
        print(f"wrote {len(records):,} predictions to {output}")


def _columns(arguments: Namespace, facts: dict[str, Any]) -> tuple[str, str]:
    text = arguments.text_column or facts.get("text_column", "text")
    return text, getattr(arguments, "label_column", None) or facts.get("label_column", "label")


def describe(counts: dict[str, int]) -> str:
    """What became of a file's records, in words."""
    parts = [f"{counts['records']:,} records, {counts['learnt']:,} of {counts['tokens']:,} tokens learnt"]
    for key, text in (
        ("truncated", "cut at the longest length"),
        ("skipped", "left out: nothing to learn in what was kept of them"),
        ("apart", "with a prompt that ends within a token: tokenized apart from the completion"),
    ):
        if counts[key]:
            parts.append(f"{counts[key]:,} {text}")
    return "; ".join(parts)


def _text(records: list[dict[str, Any]], ending: str, added: Sequence[str]) -> str:
    """Content of a file of that ending, with the columns `added` last."""
    if ending == ".jsonl":
        return "".join(as_json(record, indent=None) for record in records)
    names = dict.fromkeys(name for record in records for name in record if name not in added)
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, [*names, *added], restval="", delimiter=_DELIMITERS[ending])
    writer.writeheader()
    writer.writerows({name: _field(value) for name, value in record.items()} for record in records)
    return file.getvalue()


def _field(value: Any) -> str:
    """A value of JSON in a table: texts as they are, null as nothing."""
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)
