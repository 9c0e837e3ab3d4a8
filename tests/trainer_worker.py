"""What test_trainer.py runs in each of two processes, with its folder as argument."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_trainer import trained, trainer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import unilora_ext as ul

try:
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism
except ImportError:  # an older Transformers
    apply_tensor_parallelism = None

folder = Path(sys.argv[1])

# ---- Trainer, DDP ---------------------------------------------------------------------------------------------------

model, data = torch.load(folder / "start.pt", weights_only=False)
run = trainer(model, data, folder, max_steps=3, per_device_train_batch_size=4, save_strategy="steps", save_steps=3)
run.train()
assert run.args.world_size == 2 and type(run.model_wrapped).__name__ == "DistributedDataParallel"
if run.args.process_index == 0:
    torch.save(trained(model), folder / "trained.pt")

# ---- tensor parallelism ---------------------------------------------------------------------------------------------

model, theta_d, ids = torch.load(folder / "sharded.pt", weights_only=False)
mesh = init_device_mesh("cpu", (2,))
columns, sums = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")
other = copy.deepcopy(model)


def plan(column, row):
    names = [name for name, _ in model.named_modules() if ".layers.1." not in name]  # which stays whole
    styles = {**dict.fromkeys(columns, column), **dict.fromkeys(sums, row)}
    return {name: styles[name.rpartition(".")[2]] for name in names if name.rpartition(".")[2] in styles}


parallelize_module(model, mesh, plan(ColwiseParallel(), RowwiseParallel()))
adapter = ul.attach(model, ul.UniLoRAConfig(r=3, d=70, target_modules="all-linear", init_bound=0.5))
with torch.no_grad():
    adapter.theta_d.copy_(theta_d)
loss = model(ids, labels=ids).loss
loss.backward()
if dist.get_rank() == 0:
    torch.save({"loss": loss.detach(), "grad": adapter.theta_d.grad}, folder / "by_tensor_parallelism.pt")

if apply_tensor_parallelism is not None:
    styles = plan("colwise", "rowwise")
    apply_tensor_parallelism(other, mesh, {**styles, **{f"{name}.weight": style for name, style in styles.items()}})
    with pytest.raises(ul.AttachError, match="a tp_plan of Transformers does it too: load without it"):
        ul.attach(other, adapter.config)
dist.barrier()
dist.destroy_process_group()
