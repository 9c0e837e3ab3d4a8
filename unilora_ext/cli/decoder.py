"""The decoder: a Transformers causal language model."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from unilora_ext.cli.base import check_base, check_tokenizer, check_tokens, embedding_rows, or_a_copy
from unilora_ext.cli.conversations import Record
from unilora_ext.cli.encoding import IGNORED, encode, pad
from unilora_ext.cli.errors import CliError, need
from unilora_ext.cli.model import Score, TaskModel, attach, first_line, quiet_bars
from unilora_ext.cli.packages import model_path
from unilora_ext.cli.settings import CAUSAL_LM, Settings

__all__ = ["Decoder", "load_base"]

EVALUATION_TOKENS = 1024
"""Tokens a batch of an evaluation: its logits are the largest tensor by far."""
DEFAULT_MAX_LENGTH = 512


@dataclass(frozen=True)
class Perplexity(Score):
    """exp of the loss, which is the mean over all learnt tokens of all rows: each token weighs the same."""

    perplexity: float
    tokens: int

    def lines(self) -> list[str]:
        return [
            f"perplexity {self.perplexity!r} ({self.tokens} tokens of {self.rows} rows)",
            f"loss       {self.loss!r}",
        ]


@dataclass(frozen=True)
class Decoder(TaskModel):
    """A language model that learns texts, completions or an assistant's turns. Its rows are encoded examples."""

    task = CAUSAL_LM
    auto_class = "AutoModelForCausalLM"
    figure = "perplexity"
    speed_unit = "tokens"

    @classmethod
    def new(cls, settings: Settings, labels: Sequence[str] = ()) -> Decoder:
        model, tokenizer, max_length = load_base(
            settings.model, settings.max_length, settings.dtype, settings.quantization
        )
        return cls(model, tokenizer, max_length, attach(model, settings, "all-linear", ()))

    @classmethod
    def restored(cls, base: str, facts: dict[str, Any]) -> dict[str, Any]:
        model, tokenizer, max_length = load_base(
            base, facts["max_length"], facts["dtype"], facts.get("quantization", "none")
        )
        return {"model": model, "tokenizer": tokenizer, "max_length": max_length}

    def metadata(self, settings: Settings) -> dict[str, Any]:
        return {**super().metadata(settings), "dtype": settings.dtype, "quantization": settings.quantization}

    @property
    def pad_id(self) -> int:
        """A token to fill up with; it is masked, so any will do."""
        rows = embedding_rows(self.model)
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(number for number in known if number is not None and number < rows)

    def ready(self, rows: Sequence[Record]) -> tuple[list[dict[str, list[int]]], dict[str, int]]:
        encoded = encode(self.tokenizer, rows, self.max_length)
        place = f"{rows[0].where} and after"
        check_tokens(self.model, ((place, example["input_ids"]) for example in encoded.examples))
        return encoded.examples, encoded.counts.asdict()

    def examples(self, rows: Sequence[dict[str, list[int]]]) -> list[dict[str, list[int]]]:
        return list(rows)

    def collator(self) -> Callable[[list[dict[str, list[int]]]], dict[str, Tensor]]:
        return partial(pad, pad_id=self.pad_id)

    def loss_sum(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        return token_losses(model, inputs).sum()

    @torch.no_grad()
    def sums(self, rows: Sequence[dict[str, list[int]]]) -> list[float]:
        """[cross-entropy, learnt tokens, rows], in float64. The model is in evaluation mode meanwhile."""
        model, total, tokens = self.model, 0.0, 0
        training = model.training
        model.eval()
        try:
            for batch in _by_length(rows):
                inputs = {key: value.to(model.device) for key, value in pad(batch, self.pad_id).items()}
                losses = token_losses(model, inputs)
                total, tokens = total + losses.double().sum().item(), tokens + losses.numel()
        finally:
            model.train(training)
        return [total, tokens, len(rows)]

    def score_of(self, sums: Sequence[float]) -> Perplexity:
        total, tokens, rows = sums
        loss = total / tokens
        return Perplexity(loss, int(rows), math.exp(loss) if loss < 700 else math.inf, int(tokens))

    @torch.no_grad()
    def answer(self, prompt: Sequence[int], max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0) -> str:
        """The text with which the model goes on.

        Args:
            prompt: tokens, see :func:`~unilora_ext.cli.encoding.prompt_ids`.
            max_new_tokens: the most it may add; it stops before at its end token.
            temperature: 0: always the likeliest token; else the logits are divided by it, and tokens drawn by PyTorch's
                global generator.
            top_p: draws come from the likeliest tokens that hold this share of the probability.
        """
        base = self.model.generation_config
        ends = base.eos_token_id if isinstance(base.eos_token_id, list) else [base.eos_token_id]
        ends = {end for end in (*ends, self.tokenizer.eos_token_id) if end is not None}
        drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        config = transformers.GenerationConfig(
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(ends) or None,
            pad_token_id=self.pad_id,
            **(drawn if temperature else {"do_sample": False}),
        )
        self.model.generation_config = transformers.GenerationConfig()  # a model's own penalties would be added
        ids = torch.tensor([list(prompt)], device=self.model.device)
        try:
            out = self.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        finally:
            self.model.generation_config = base
        return self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def token_losses(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """float32 [learnt tokens]: the cross-entropy of each, predicted from all before it."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits
    targets = inputs["labels"][:, 1:]
    learnt = targets != IGNORED
    return cross_entropy(logits[:, :-1][learnt].float(), targets[learnt], reduction="none")


def _by_length(rows: Sequence[dict[str, list[int]]]) -> list[list[dict[str, list[int]]]]:
    """Batches in order of length, so that little is padding; the same for the same rows."""
    batches: list[list[dict[str, list[int]]]] = []
    for row in sorted(rows, key=lambda row: len(row["input_ids"])):
        if not batches or (len(batches[-1]) + 1) * len(row["input_ids"]) > EVALUATION_TOKENS:
            batches.append([])
        batches[-1].append(row)
    return batches


def load_base(base: str, max_length: int | None, dtype: str, quantization: str = "none") -> tuple[Any, Any, int]:
    """(model, tokenizer, max_length) of a base model.

    Args:
        base: a model folder, a hub name, a ``.gguf`` file (its weights are unpacked), or a name of
            :data:`~unilora_ext.cli.packages.MODELS`.
        max_length: tokens kept of a row; None: 512 or what the model takes.
        dtype: of the weights: ``float32`` or ``bfloat16``.
        quantization: of the linear layers: ``none`` or ``nf4``.

    Raises:
        CliError: the model cannot be loaded, lacks weights or is no causal one; the message says why.
    """
    path, options = model_path(base), {}
    if path.lower().endswith(".gguf"):
        need("gguf")
        if not os.path.isfile(path):
            raise CliError(f"--model {base}: expected a GGUF file, got no such file")
        path, options["gguf_file"] = os.path.split(os.path.abspath(path))
    else:
        check_base(path)
    if quantization != "none":
        need("bitsandbytes")
        if "gguf_file" in options:
            raise CliError("--quantization: expected none with a .gguf file, whose weights are unpacked; got nf4")
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
    with quiet_bars():
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, gguf_file=options.get("gguf_file"))
            # Before GgufConfig, a GGUF file was always unpacked.
            if "gguf_file" in options and hasattr(transformers, "GgufConfig"):
                options["quantization_config"] = transformers.GgufConfig(dequantize=True)
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                path, dtype=getattr(torch, dtype), output_loading_info=True, **options
            )
        except Exception as error:  # Transformers and safetensors raise of every kind for files that do not fit
            raise CliError(
                f"--model {base}: expected a Transformers causal language model with its tokenizer; "
                f"loading it failed: {first_line(error)}{or_a_copy(path)}"
            ) from error
    check_tokenizer(base, tokenizer)
    missing = sorted({*map(str, info["missing_keys"]), *map(str, info["mismatched_keys"])})
    if missing:
        raise CliError(
            f"--model {base}: expected the weights of a {type(model).__name__}, got none for {len(missing)} of them, "
            f"such as {missing[0]}"
        )
    if "gguf_file" in options:
        _forget_blocks(model)
        model.config._name_or_path = base
    # A CPU packs four-bit weights anew in the first pass, and the digests would be those of that.
    if quantization == "none" and not _is_causal(model):
        raise CliError(
            f"--model {base}: expected a causal language model, got a {type(model).__name__} in which a token sees "
            "those after it"
        )
    limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or 10**9)
    if max_length is not None and max_length > limit:
        raise CliError(f"--max-length: expected at most {limit}, the longest input of {base}; got {max_length}")
    return model, tokenizer, max_length or min(DEFAULT_MAX_LENGTH, limit)


def _forget_blocks(model: Any) -> None:
    """A model unpacked from GGUF holds plain weights, and is trained and saved as one that never was quantised."""
    model.is_quantized = False
    for holder, name in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
    ):
        if hasattr(holder, name):
            delattr(holder, name)


@torch.no_grad()
def _is_causal(model: nn.Module) -> bool:
    """Whether a change of the last token leaves what is predicted before it as it was."""
    model.eval()
    tokens = torch.arange(4, device=model.device) % model.config.vocab_size
    changed = tokens.clone()
    changed[-1] = 0
    one, other = (model(input_ids=ids[None], use_cache=False).logits[0, :-1].float() for ids in (tokens, changed))
    rounding = 1e-5 if model.dtype == torch.float32 else 2e-2  # of another order of sums, in a mixture of experts
    return bool((one - other).abs().max() <= rounding * one.abs().max())
