"""Setting up: attaching to a model of Llama2-7B's shape on the meta device, its index included; and the bytes kept."""

from __future__ import annotations

import torch
from common import Options, Row, measure, rows_of
from peft import UniLoraConfig
from peft.tuners.unilora.model import UniLoraModel
from rivals import peft_factors
from shapes import LLAMA2_7B, MODELS
from torch import nn

import unilora_ext as ul


def run(options: Options) -> list[Row]:
    model = LLAMA2_7B
    config = ul.UniLoRAConfig(r=model.r, d=model.d, target_modules="all-linear")

    def ours() -> None:
        with torch.device("meta"):
            layers = nn.Sequential(*(nn.Linear(n, m, bias=False) for m, n in model.modules))
        adapter = ul.attach(layers, config)
        adapter.projection.restrict("cpu").operands(torch.float32)

    def theirs() -> None:
        UniLoraModel.generate_index(model.D, model.d, UniLoraConfig().proj_seed)

    times = measure({"unilora_ext, attach and index": ours, "PEFT UniLora, index alone": theirs}, options, least=3)
    case: Row = {"model": model.name, "D": model.D, "d": model.d}
    rows = list(rows_of("attach", case, times, "PEFT UniLora, index alone"))
    for size in MODELS:
        stored, computed = (
            ul.UniformProjection(size.D, size.d, materialize=m).restrict("cpu").nbytes for m in (True, False)
        )
        kept = {"unilora_ext": stored, "unilora_ext, computed": computed, "PEFT UniLora": peft_factors(size)[2]}
        for name, nbytes in kept.items():
            case = {"model": size.name, "D": size.D, "d": size.d, "rival": name}
            rows.append({"bench": "memory", **case, "bytes": nbytes, "bytes_per_element": round(nbytes / size.D, 3)})
    return rows
