"""One new token of a causal language model with a cache: the shape of SmolLM2-135M, random weights, float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from common import Options, Row, measure, rows_of, threads
from rivals import adapted
from torch import nn

import unilora_ext as ul

SHAPE = dict(
    hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
    vocab_size=49152, tie_word_embeddings=True,
)  # fmt: skip
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
R, D, PROMPT = 4, 65_536, 16


def decoder() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def merged() -> nn.Module:
    model = adapted("unilora_ext", decoder, TARGETS, R, D)
    ul.get_adapter(model).merge()
    return model


def token_of(model: nn.Module, device: str) -> Callable[[], Any]:
    """A call that adds one token to a prompt and takes it back from the cache."""
    from transformers import DynamicCache

    model = model.to(device).eval()
    prompt = torch.randint(0, SHAPE["vocab_size"], (1, PROMPT), generator=torch.Generator().manual_seed(0)).to(device)
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=prompt, past_key_values=cache)

    @torch.no_grad()
    def token() -> None:
        model(input_ids=prompt[:, :1], past_key_values=cache)
        cache.crop(-1)

    return token


def run(options: Options) -> list[Row]:
    models = {
        "base": decoder,
        "unilora_ext": lambda: adapted("unilora_ext", decoder, TARGETS, R, D),
        "unilora_ext merged": merged,
        "peft-lora": lambda: adapted("peft-lora", decoder, TARGETS, R, D),
        "peft-unilora": lambda: adapted("peft-unilora", decoder, TARGETS, R, D),
    }
    tokens = {name: token_of(make(), options.device) for name, make in models.items()}
    rows: list[Row] = []
    for count in options.threads if options.device == "cpu" else (None,):
        with threads(count or torch.get_num_threads()):
            times = measure(tokens, options, least=20)
        case: Row = {"model": "30 x 576 (SmolLM2-135M)", "r": R, "d": D, "threads": count}
        rows += rows_of("decode", case, times, "base")
    return rows
