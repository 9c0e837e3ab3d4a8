"""export_lora: PEFT reads it as plain LoRA and computes the same; the files are what vLLM expects."""

import copy
import json

import pytest
import torch
from models import Tower, tokens
from safetensors.torch import load_file

import unilora_ext as ul

peft = pytest.importorskip("peft")


def config(**changes):
    given = {"r": 3, "d": 64, "target_modules": ["up", "down"], "alpha": 6.0, "init_bound": 0.5}
    return ul.UniLoRAConfig(**{**given, **changes})


@pytest.mark.parametrize("projection", ["uniform", "balanced", "peft"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"r": 1, "d": 7, "alpha": None},
        {"r": 5, "alpha": 0.5},
        {"target_modules": ["down"]},  # no bias
        {"target_modules": "all-linear", "dropout": 0.1},
        {"modules_to_save": ["head"]},
    ],
)
@pytest.mark.parametrize("merged", [False, True])
def test_peft_computes_the_same(tmp_path, projection, changes, merged):
    model, x = Tower(), tokens()
    plain = copy.deepcopy(model)
    adapter = ul.attach(model, config(projection=projection, **changes))
    with torch.no_grad():
        for tensor in adapter.modules_to_save().values():
            tensor.normal_()
    y = model.eval()(x)
    if merged:
        adapter.merge()
    adapter.export_lora(tmp_path)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path)
    torch.testing.assert_close(theirs(x), y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(theirs.merge_and_unload()(x), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_base_of_another_dtype(tmp_path, dtype):
    """The factors are written in float32 (float64), whatever the base; PEFT computes in its way from the same."""
    model, x = Tower().to(dtype), tokens()
    plain = copy.deepcopy(model)
    adapter = ul.attach(model, config())
    adapter.export_lora(tmp_path)
    for name, layer in adapter.layers.items():
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        A, B = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        assert A.dtype == B.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(2.0 * B @ A, layer.delta_weight())
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path)
    tolerance = 1e-5 if dtype == torch.float64 else 0.05
    torch.testing.assert_close(theirs(x), model(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("merged", [False, True])
def test_gpt2_conv1d(tmp_path, merged):
    transformers = pytest.importorskip("transformers")
    sizes = transformers.GPT2Config(n_embd=18, n_layer=2, n_head=2, vocab_size=30, n_positions=16)
    model = transformers.GPT2LMHeadModel(sizes).eval()
    plain, x = copy.deepcopy(model), torch.randint(0, 30, (2, 9))
    adapter = ul.attach(model, config(target_modules=["c_attn", "c_proj"], init_bound=1.0))
    y = model(x).logits
    if merged:
        adapter.merge()
    adapter.export_lora(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    torch.testing.assert_close(theirs(x).logits, y, rtol=1e-4, atol=1e-4)


def test_what_vllm_checks(tmp_path):
    """vLLM takes the tensors' names for the modules, by their last part, and these fields of the configuration."""
    transformers = pytest.importorskip("transformers")
    sizes = transformers.LlamaConfig(
        hidden_size=24, num_attention_heads=3, num_key_value_heads=1, intermediate_size=44, num_hidden_layers=2,
        vocab_size=30, head_dim=8,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(sizes)
    adapter = ul.attach(model, config(r=8, d=200, target_modules="all-linear", alpha=16.0))
    adapter.export_lora(tmp_path)
    record = json.loads((tmp_path / "adapter_config.json").read_text())
    assert record["peft_type"] == "LORA" and record["r"] == 8 and record["lora_alpha"] / record["r"] == 2.0
    assert isinstance(record["lora_alpha"], int)
    assert record["bias"] == "none" and record["fan_in_fan_out"] is False and record["modules_to_save"] is None
    assert not record.get("use_rslora") and not record.get("use_dora")
    modules = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.rpartition(".")[2] for name in record["target_modules"]} == modules
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 2
    for key, tensor in tensors.items():
        prefix, name, part = key[: len("base_model.model.")], key[len("base_model.model.") :], key.split(".")[-2]
        assert prefix == "base_model.model." and key.endswith((".lora_A.weight", ".lora_B.weight"))
        m, n = model.get_submodule(name.removesuffix(f".{part}.weight")).weight.shape
        assert tensor.shape == ((8, n) if part == "lora_A" else (m, 8)) and name.split(".")[-3] in modules
