"""Supervised fine-tuning with TRL: python sft.py --model M --data rows.jsonl --output adapter [--four-bit]

Rows have a `text`, or `prompt` and `completion`, or `messages`: what TRL's SFTTrainer takes.
"""

import argparse

import datasets
import torch
import transformers
import trl

import unilora_ext as ul
from unilora_ext.integrations.trl import SFTTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True)
parser.add_argument("--output", required=True)
parser.add_argument("--four-bit", action="store_true", help="QLoRA: the base model in nf4")
parser.add_argument("--r", type=int, default=4)
parser.add_argument("--lr", type=float, default=5e-3)
parser.add_argument("--epochs", type=float, default=1)
parser.add_argument("--batch-size", type=int, default=8)
options = parser.parse_args()

nf4 = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
trainer = SFTTrainer(
    options.model,
    trl.SFTConfig(
        options.output,
        learning_rate=options.lr,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        report_to="none",
    ),
    train_dataset=datasets.load_dataset("json", data_files=options.data, split="train"),
    quantization_config=nf4 if options.four_bit else None,
    peft_config=ul.UniLoRAConfig(r=options.r, target_modules="all-linear"),
)
trainer.train()
trainer.save_model()  # the adapter: ul.load(model, options.output), or from_pretrained(options.output)
