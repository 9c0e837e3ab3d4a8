"""Tokens of a causal language model's records, and which of them are learnt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from unilora_ext.cli.conversations import Record
from unilora_ext.cli.data import IGNORED
from unilora_ext.cli.errors import CliError

__all__ = ["IGNORED", "Encoded", "encode", "pad", "prompt_ids"]


@dataclass(frozen=True)
class Counts:
    """What became of a file's records.

    Attributes:
        records: kept.
        tokens: of these.
        learnt: tokens among them that are learnt.
        truncated: records cut at the longest length.
        skipped: records of which nothing to learn was left.
        apart: records whose prompt ends within a token of the whole: prompt and completion were tokenized apart.
    """

    records: int
    tokens: int
    learnt: int
    truncated: int
    skipped: int
    apart: int

    def asdict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class Encoded:
    """``{"input_ids", "labels"}`` of every record kept, and the counts. labels[i] is input_ids[i] or `IGNORED`; the
    first is always ignored, since nothing comes before it."""

    examples: list[dict[str, list[int]]]
    counts: Counts


def encode(tokenizer: Any, records: Sequence[Record], max_length: int) -> Encoded:
    """Encodes records.

    A text is learnt whole, a completion after its prompt, and of a conversation the assistant's turns. Texts and
    completions end in the tokenizer's end token, if it has one.

    Args:
        tokenizer: of the model.
        records: of any kind.
        max_length: what lies beyond is cut off.

    Raises:
        CliError: a conversation that the chat template does not take or does not tell apart, or nothing to learn in
            all records.
    """
    examples, truncated, skipped, apart = [], 0, 0, 0
    for record in records:
        ids, learnt, split = _encode(tokenizer, record)
        apart += split
        labels = [token if keep and i else IGNORED for i, (token, keep) in enumerate(zip(ids, learnt, strict=True))]
        truncated += len(ids) > max_length
        example = {"input_ids": ids[:max_length], "labels": labels[:max_length]}
        if any(label != IGNORED for label in example["labels"]):
            examples.append(example)
        else:
            skipped += 1
    if not examples:
        raise CliError(
            f"{records[0].where}: expected at least one record with something to learn in its first {max_length} "
            f"tokens, got none in {len(records)} records; a greater --max-length may help"
        )
    tokens = sum(len(example["input_ids"]) for example in examples)
    targets = sum(label != IGNORED for example in examples for label in example["labels"])
    return Encoded(examples, Counts(len(examples), tokens, targets, truncated, skipped, apart))


def prompt_ids(tokenizer: Any, record: Record) -> list[int]:
    """Tokens that a model continues to answer a record: its text or prompt, or its messages up to the last that is not
    the assistant's, as the chat template opens the assistant's turn."""
    if "messages" not in record.fields:
        return _opening(tokenizer, record.fields.get("prompt", record.fields.get("text")))
    messages = list(record.fields["messages"])
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise CliError(f"{record.where}: 'messages': expected one to answer, got the assistant's only")
    return _templated(tokenizer, messages, record.where, add_generation_prompt=True)["input_ids"]


def _encode(tokenizer: Any, record: Record) -> tuple[list[int], list[bool], bool]:
    """(tokens, whether each is learnt, whether prompt and completion were tokenized apart)"""
    fields = record.fields
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if "messages" in fields:
        return *_conversation(tokenizer, fields["messages"], record.where), False
    if "text" in fields:
        ids = _opening(tokenizer, fields["text"]) + end
        return ids, [True] * len(ids), False
    # The same tokens as when the prompt stands alone: those it will be generated from.
    prompt = _opening(tokenizer, fields["prompt"])
    ids = _opening(tokenizer, fields["prompt"] + fields["completion"])
    apart = ids[: len(prompt)] != prompt
    if apart:
        ids = prompt + tokenizer(fields["completion"], add_special_tokens=False, verbose=False)["input_ids"]
    ids = ids + end
    return ids, [i >= len(prompt) for i in range(len(ids))], apart


def _opening(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text that goes on: with the opening token of tokenizers that add one, without a closing one."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    closed = ids and ids[-1] == tokenizer.eos_token_id and not text.rstrip().endswith(tokenizer.eos_token)
    return ids[:-1] if closed else ids


def _conversation(tokenizer: Any, messages: list[dict[str, Any]], where: str) -> tuple[list[int], list[bool]]:
    """(tokens, whether each belongs to an assistant's turn), by the template's own marks or by its prefixes."""
    if re.search(r"\{%-?\s*generation\b", _template(tokenizer, where)):
        marked = _templated(tokenizer, messages, where, return_assistant_tokens_mask=True)
        return marked["input_ids"], [bool(mark) for mark in marked["assistant_masks"]]
    ids = _templated(tokenizer, messages, where)["input_ids"]
    learnt = [False] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _templated(tokenizer, messages[:i], where, add_generation_prompt=True)["input_ids"]
        through = _templated(tokenizer, messages[: i + 1], where)["input_ids"]
        if through[: len(before)] != before or ids[: len(through)] != through:
            raise CliError(
                f"{where}: message {i + 1}: expected a chat template that writes a conversation's beginning as it "
                "writes the whole, so that the assistant's turns can be told apart; this tokenizer's does not: give it "
                "one with {% generation %} marks"
            )
        learnt[len(before) : len(through)] = [True] * (len(through) - len(before))
    return ids, learnt


def _template(tokenizer: Any, where: str) -> str:
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise CliError(f"{where}: 'messages': expected a tokenizer with a chat template, got one without") from error


def _templated(tokenizer: Any, messages: list[dict[str, Any]], where: str, **options: bool) -> Any:
    _template(tokenizer, where)
    try:
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    except Exception as error:  # a template raises what it likes, as for roles out of turn
        raise CliError(f"{where}: expected messages that the chat template takes; it refused: {error}") from error


def pad(examples: Sequence[dict[str, list[int]]], pad_id: int) -> dict[str, Tensor]:
    """A batch, padded on the right: ``input_ids``, ``attention_mask`` and ``labels``, int64 [rows, tokens]."""
    width = max(len(example["input_ids"]) for example in examples)

    def filled(key: str, value: int) -> Tensor:
        return torch.tensor([example[key] + [value] * (width - len(example[key])) for example in examples])

    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    return {
        "input_ids": filled("input_ids", pad_id),
        "attention_mask": (torch.arange(width) < lengths[:, None]).long(),
        "labels": filled("labels", IGNORED),
    }
