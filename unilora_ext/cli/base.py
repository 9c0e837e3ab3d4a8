"""What is checked of a base model before anything is done with it, and the digests by which it is known again."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import unilora_ext as ul
from unilora_ext.attachment import CHILD, exchanged_tensors
from unilora_ext.cli.errors import CliError

__all__ = [
    "base_digest",
    "base_sha256",
    "check_base",
    "check_known",
    "check_tokenizer",
    "check_tokens",
    "embedding_rows",
    "or_a_copy",
]


def check_base(base: str) -> None:
    """Refuses a path that is no model folder; whatever else is no path may be a hub name."""
    if os.path.isdir(base):
        if not os.path.isfile(os.path.join(base, "config.json")):
            raise CliError(f"--model {base}: expected a model folder with config.json, found none in it")
    elif Path(base).is_absolute() or base.startswith((".", "~")) or base.count("/") > 1:
        raise CliError(f"--model {base}: expected a model folder or a hub name, got a path that is no folder")


def or_a_copy(base: str) -> str:
    """What to add to the error of a hub name that could not be loaded."""
    return "" if os.path.exists(base) else "; where the hub cannot be reached, give a copy of it: --model FOLDER"


# ---- tokenizer ------------------------------------------------------------------------------------------------------


def check_tokenizer(base: str, tokenizer: Any) -> None:
    """Refuses a tokenizer without a vocabulary, which Transformers makes up where a model folder has none.

    Raises:
        CliError: it knows its special tokens alone: every text would look the same.
    """
    known = set(tokenizer.get_vocab())
    # What a class adds by itself (an underscore, a byte's name) is no vocabulary either.
    if len(known - set(tokenizer.all_special_tokens)) < 2:
        raise CliError(
            f"--model {base}: expected a model folder with its tokenizer, got one without a vocabulary "
            f"(a {type(tokenizer).__name__} of {len(known)} tokens: {sorted(known)[:6]})"
        )


def embedding_rows(model: Any) -> float:
    """How many tokens a Transformers model has an embedding for; infinity where it computes them, as CANINE does."""
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        return math.inf
    return embedding.num_embeddings if isinstance(embedding, nn.Embedding) else math.inf


def check_tokens(model: nn.Module, texts: Iterable[tuple[str, Sequence[int]]]) -> None:
    """Refuses tokens that the model has no embedding for.

    Args:
        model: a Transformers model.
        texts: (place, token numbers) of each.

    Raises:
        CliError: naming the first place.
    """
    rows = embedding_rows(model)
    for where, ids in texts:
        if ids and max(ids) >= rows:
            raise CliError(
                f"{where}: expected token numbers below {rows}, the rows of the model's embedding, got {max(ids)}: "
                "the tokenizer is not this model's"
            )


def check_known(where: str, tokenizer: Any, texts: Sequence[Sequence[int]]) -> None:
    """Refuses texts of which the tokenizer knows nothing: there is nothing to tell them apart by.

    Args:
        where: they come from.
        tokenizer: of the model.
        texts: token numbers of each.

    Raises:
        CliError: no text has a token that is neither the unknown nor another special one.
    """
    special = set(tokenizer.all_special_ids)
    if all(special.issuperset(ids) for ids in texts):
        raise CliError(
            f"{where}: expected texts that the model's tokenizer has tokens for, got nothing but unknown and special "
            f"tokens in all {len(texts)} rows"
        )


# ---- weights --------------------------------------------------------------------------------------------------------


def base_digest(adapter: ul.Adapter) -> str:
    """A short digest of the base weights (the first row of every adapted one), to tell another base model."""
    digest = hashlib.sha256()
    for name, layer in adapter.layers.items():
        digest.update(name.encode() + layer.weight[0].detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def base_sha256(adapter: ul.Adapter) -> str:
    """SHA-256 of all that the adapter leaves as the base model has it: weights, and buffers of real numbers.

    Of every byte, since one changed layer changes every number of a run; that costs less than reading the weights from
    a disk, as the tensors are hashed side by side. Not of their names and order: those are a library's.
    """
    model = adapter.model
    own = {*(f"{CHILD}.{name}" for name in adapter.trained), *exchanged_tensors(model, adapter.config)}
    frozen = {
        (tensor.data_ptr(), tensor.shape): tensor  # a tied weight once
        for name, tensor in model.state_dict().items()
        if name not in own and tensor.is_floating_point() and tensor.numel()
    }
    with ThreadPoolExecutor(min(len(frozen), os.cpu_count() or 1)) as pool:
        return hashlib.sha256(b"".join(sorted(pool.map(_sha256, frozen.values())))).hexdigest()


def _sha256(tensor: Tensor) -> bytes:
    data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(data.numpy())
    return digest.digest()
