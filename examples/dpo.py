"""Preferences with TRL's DPO: python dpo.py --model M --data pairs.jsonl --output adapter

Rows have a `prompt`, a `chosen` and a `rejected` answer. The reference is the model with its adapter off.
"""

import argparse

import datasets
import torch
import trl

import unilora_ext as ul
from unilora_ext.integrations.trl import DPOTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True)
parser.add_argument("--output", required=True)
parser.add_argument("--r", type=int, default=4)
parser.add_argument("--lr", type=float, default=5e-3)
parser.add_argument("--beta", type=float, default=0.1)
parser.add_argument("--epochs", type=float, default=1)
parser.add_argument("--batch-size", type=int, default=8)
options = parser.parse_args()

trainer = DPOTrainer(
    options.model,
    args=trl.DPOConfig(
        options.output,
        learning_rate=options.lr,
        beta=options.beta,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        report_to="none",
    ),
    train_dataset=datasets.load_dataset("json", data_files=options.data, split="train"),
    peft_config=ul.UniLoRAConfig(r=options.r, target_modules="all-linear"),
)
trainer.train()
trainer.save_model()
