"""Fine-tunes a causal language model with Uni-LoRA and FSDP2, one process a device:

    torchrun --nproc-per-node 8 examples/fsdp.py --model meta-llama/Llama-2-7b-hf --text corpus.txt --output adapter

The weights are sharded; a step reduces d numbers, the gradient of theta_d.
"""

import argparse

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

import unilora_ext as ul

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--text", required=True, help="a text file, one example a line")
parser.add_argument("--output", required=True, help="folder of the adapter")
parser.add_argument("--length", type=int, default=524_288, help="of theta_d")
parser.add_argument("--batch-size", type=int, default=8, help="examples a step, on all processes together")
parser.add_argument("--lr", type=float, default=2e-3)
parser.add_argument("--bf16", action="store_true")
args = parser.parse_args()

dist.init_process_group()
rank, size = dist.get_rank(), dist.get_world_size()
if args.batch_size % size:
    parser.error(f"--batch-size: expected a multiple of the {size} processes, got {args.batch_size}")
if torch.cuda.is_available():
    torch.cuda.set_device(rank % torch.cuda.device_count())

torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(args.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
adapter = ul.attach(model, ul.UniLoRAConfig(r=4, d=args.length, target_modules="all-linear"))

policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if args.bf16 else MixedPrecisionPolicy()
for block in model.model.layers:
    fully_shard(block, mp_policy=policy)
ul.distributed.fully_shard(model, mp_policy=policy)  # theta_d stays whole, in float32
optimizer = torch.optim.AdamW([adapter.theta_d], lr=args.lr)

with open(args.text, encoding="utf-8") as file:
    lines = [line.strip() for line in file if line.strip()]
for start in range(0, len(lines) - args.batch_size + 1, args.batch_size):
    texts = lines[start : start + args.batch_size][rank::size]
    batch = tokenizer(texts, return_tensors="pt", padding=True).to(model.device)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    tokens = (labels[:, 1:] != -100).sum()
    dist.all_reduce(tokens)
    # Summed over this process's tokens; the mean over processes makes it the mean over all tokens.
    loss = model(**batch, labels=labels, num_items_in_batch=tokens).loss * size
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_([adapter.theta_d], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    total = loss.detach() / size
    dist.all_reduce(total)
    if rank == 0:
        print(f"step {start // args.batch_size + 1}  loss {total:.4f}  gradient {norm:.4f}", flush=True)

if rank == 0:
    adapter.save(args.output)
dist.barrier()
dist.destroy_process_group()
