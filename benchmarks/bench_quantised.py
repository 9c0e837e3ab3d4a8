"""A 4-bit base: does the adapter act? all-MiniLM-L6-v2 with bitsandbytes' nf4, 30 steps of the adapter alone.

Not a timing: for each rival, how much its fresh adapter changes the logits, the norm of its first gradient, and the
loss on 64 reviews before and after. Needs bitsandbytes and the demo's model and reviews.
"""

from __future__ import annotations

import itertools

import torch
from common import Options, Row
from rivals import adapted
from torch import Tensor, nn

from unilora_ext.cli.demo import MODEL, REVIEWS, read_reviews
from unilora_ext.cli.packages import package_file

KINDS = {"unilora_ext": 2e-2, "peft-unilora": 2e-2, "peft-lora": 2e-3}  # with the learning rate
STEPS, ROWS, BATCH, LENGTH, R, D_SMALL = 30, 64, 16, 32, 4, 2048


def quantised(quant_type: str = "nf4", double: bool = True) -> nn.Module:
    """MiniLM for two classes, all linear layers but the head in 4 bits, on the CPU, without dropout.

    In training mode: in evaluation bitsandbytes repacks the weights on the CPU for a product without a derivative.
    """
    from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

    torch.manual_seed(0)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["classifier"],
    )
    model = AutoModelForSequenceClassification.from_pretrained(
        package_file(*MODEL),
        num_labels=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        quantization_config=config,
        dtype=torch.float32,
        device_map={"": "cpu"},
    )
    return model.train()


def reviews() -> dict[str, Tensor]:
    """64 reviews as tensors."""
    from transformers import AutoTokenizer

    rows = read_reviews(package_file(*REVIEWS), seed=0)[:ROWS]
    tokenizer = AutoTokenizer.from_pretrained(package_file(*MODEL))
    tokens = tokenizer(
        [row.text for row in rows], padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
    )
    return {**tokens, "labels": torch.tensor([row.label == "positive" for row in rows]).long()}


def act(kind: str, data: dict[str, Tensor]) -> Row:
    """Trains one kind of adapter, the head frozen, and says what it did."""
    model = adapted(kind, quantised, ["query", "value"], R, D_SMALL).train()
    trained = [p for name, p in model.named_parameters() if p.requires_grad and "classifier" not in name]
    with torch.no_grad():
        before = model(**data)
        change = float((before.logits - quantised()(**data).logits).abs().max())
    optimizer, norm = torch.optim.Adam(trained, lr=KINDS[kind]), None
    starts = itertools.islice(itertools.cycle(range(0, len(data["labels"]), BATCH)), STEPS)
    for start in starts:
        optimizer.zero_grad()
        model(**{name: t[start : start + BATCH] for name, t in data.items()}).loss.backward()
        if norm is None:
            norm = float(torch.stack([p.grad.norm() for p in trained if p.grad is not None]).norm())
        optimizer.step()
    with torch.no_grad():
        after = model(**data)
    losses = {"loss_before": float(before.loss), "loss_after": float(after.loss)}
    return {"logit_change": change, "gradient_norm": norm, **losses}


def run(options: Options) -> list[Row]:
    if options.device != "cpu":
        return []
    from transformers.utils import logging

    logging.set_verbosity_error()  # the head is new, as it should be
    logging.disable_progress_bar()
    data = reviews()
    case: Row = {"bench": "quantised", "model": "all-MiniLM-L6-v2", "base": "bitsandbytes nf4, double", "steps": STEPS}
    return [{**case, "rival": kind, **act(kind, data)} for kind in KINDS]
