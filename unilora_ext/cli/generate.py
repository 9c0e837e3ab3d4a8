"""``unilora generate``: text by a causal language model with a saved adapter."""

from __future__ import annotations

import math
from argparse import Namespace
from pathlib import Path

from unilora_ext.checkpoint import read
from unilora_ext.cli.conversations import Record, read_conversations
from unilora_ext.cli.errors import CliError, need
from unilora_ext.cli.files import TextFormat, as_json, check_unicode
from unilora_ext.cli.outputs import check_target, write
from unilora_ext.cli.settings import CAUSAL_LM, check_task

__all__ = ["command"]


def command(arguments: Namespace) -> None:
    """Prints what the model says, or writes a file."""
    need("transformers")
    facts = read(arguments.adapter).metadata
    check_task(arguments.adapter, facts, CAUSAL_LM, "unilora predict")
    _check(arguments)
    records = _records(arguments, arguments.text_column or facts.get("text_column", "text"))

    import torch

    from unilora_ext.cli.base import check_tokens
    from unilora_ext.cli.encoding import prompt_ids
    from unilora_ext.cli.tasks import load_on

    decoder, _ = load_on(arguments.adapter, arguments.model, arguments.device)
    prompts = [prompt_ids(decoder.tokenizer, record) for record in records]
    check_tokens(decoder.model, zip((record.where for record in records), prompts, strict=True))
    _check_lengths(decoder.model, records, prompts, arguments.max_new_tokens)
    torch.manual_seed(arguments.seed)
    answers = []
    for number, (record, prompt) in enumerate(zip(records, prompts, strict=True), 1):
        text = decoder.answer(prompt, arguments.max_new_tokens, arguments.temperature, arguments.top_p)
        answers.append({**record.fields, "generated": text})
        if arguments.output is None:
            print(f"[{number}] {text}" if len(records) > 1 else text, flush=True)
    if arguments.output is not None:
        write(arguments.output, "".join(as_json(answer, indent=None) for answer in answers))
        print(f"wrote {len(answers):,} answers to {arguments.output}")


def _check(arguments: Namespace) -> None:
    given = [name for name in ("prompt", "message", "data") if getattr(arguments, name) is not None]
    if len(given) != 1:
        got = " and ".join(f"--{name}" for name in given) or "none"
        raise CliError(f"--prompt, --message, --data: expected one of them, got {got}")
    if arguments.system is not None and given != ["message"]:
        raise CliError(f"--system: expected with --message only, got it with --{given[0]}")
    if arguments.max_new_tokens < 1:
        raise CliError(f"--max-new-tokens: expected an integer >= 1, got {arguments.max_new_tokens}")
    if not 0 <= arguments.temperature < math.inf:
        raise CliError(f"--temperature: expected a number >= 0, got {arguments.temperature}")
    if not 0 < arguments.top_p <= 1:
        raise CliError(f"--top-p: expected a number in (0, 1], got {arguments.top_p}")
    if arguments.top_p != 1 and arguments.temperature == 0:
        raise CliError(f"--top-p: expected with --temperature above 0 only, got {arguments.top_p} without draws")
    if not 0 <= arguments.seed < 2**63:
        raise CliError(f"--seed: expected an integer in [0, 2^63), got {arguments.seed}")
    if arguments.output is not None and Path(arguments.output).suffix.lower() != ".jsonl":
        raise CliError(f"--output {arguments.output}: expected a name that ends in .jsonl, got another")
    check_target(arguments.output, arguments.data, "--output")


def _records(arguments: Namespace, text_column: str) -> list[Record]:
    if arguments.data is not None:
        return read_conversations(arguments.data, text_column, answered=False, form=TextFormat.of(arguments))
    option, texts = ("--prompt", arguments.prompt) if arguments.prompt else ("--message", arguments.message)
    check_unicode(arguments.system or "", "--system")
    records = []
    for number, text in enumerate(texts, 1):
        where = f"{option} number {number}"
        check_unicode(text, where)
        if not text.strip():
            raise CliError(f"{where}: expected a text, got nothing")
        if option == "--prompt":
            records.append(Record({"prompt": text}, where))
        else:
            system = [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
            records.append(Record({"messages": [*system, {"role": "user", "content": text}]}, where))
    return records


def _check_lengths(model, records: list[Record], prompts: list[list[int]], new: int) -> None:
    """Refuses what the model has no positions for: beyond them it would write nonsense."""
    limit = getattr(model.config, "max_position_embeddings", None)
    for record, prompt in zip(records, prompts, strict=True):
        if not prompt:
            raise CliError(f"{record.where}: expected a text of at least one token, got none")
        if limit is not None and len(prompt) + new > limit:
            raise CliError(
                f"{record.where}: expected at most {limit} tokens, prompt and answer together, as the model takes; "
                f"got {len(prompt)} and --max-new-tokens {new}"
            )
