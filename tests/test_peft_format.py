"""export_lora: PEFT reads it as plain LoRA and computes the same."""

import copy

import pytest
import torch
from models import Tower, tokens

import unilora_ext as ul

peft = pytest.importorskip("peft")


def test_peft_computes_the_same(tmp_path):
    model, x = Tower(), tokens()
    plain = copy.deepcopy(model)
    adapter = ul.attach(
        model,
        ul.UniLoRAConfig(r=3, d=64, target_modules=["up", "down"], alpha=6.0, modules_to_save=["head"], init_bound=1.0),
    )
    with torch.no_grad():
        model.head.weight.normal_()
    adapter.export_lora(tmp_path)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path)
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-4, atol=1e-4)


def test_gpt2_conv1d(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).eval()
    plain, x = copy.deepcopy(model), torch.randint(0, 30, (2, 9))
    adapter = ul.attach(model, ul.UniLoRAConfig(r=2, d=50, target_modules=["c_attn", "c_proj"], init_bound=1.0))
    adapter.export_lora(tmp_path)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    torch.testing.assert_close(theirs(x).logits, model(x).logits, rtol=1e-4, atol=1e-4)
