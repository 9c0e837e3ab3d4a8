"""Reinforcement learning with TRL's GRPO: python grpo.py --model M --data prompts.jsonl --output adapter

Rows have a `prompt`. The reward here is for answers near 40 characters: put your own in its place. The reference, where
--beta is not 0, is the model with its adapter off.
"""

import argparse

import datasets
import torch
import trl

import unilora_ext as ul
from unilora_ext.integrations.trl import GRPOTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True)
parser.add_argument("--output", required=True)
parser.add_argument("--r", type=int, default=4)
parser.add_argument("--lr", type=float, default=5e-3)
parser.add_argument("--beta", type=float, default=0.04)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--length", type=int, default=64, help="tokens of an answer at most")
options = parser.parse_args()


def near_forty(completions, **columns):
    return [-abs(40 - len(text)) / 40 for text in completions]


trainer = GRPOTrainer(
    options.model,
    near_forty,
    trl.GRPOConfig(
        options.output,
        learning_rate=options.lr,
        beta=options.beta,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        num_generations=options.batch_size,
        max_completion_length=options.length,
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        report_to="none",
    ),
    train_dataset=datasets.load_dataset("json", data_files=options.data, split="train"),
    peft_config=ul.UniLoRAConfig(r=options.r, target_modules="all-linear"),
)
trainer.train()
trainer.save_model()
