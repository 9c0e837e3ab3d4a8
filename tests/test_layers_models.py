"""Models of convolutions, embeddings and linear layers at once: a U-Net of Diffusers, a ResNet of Transformers."""

import copy

import pytest
import torch

import unilora_ext as ul


def unet():
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=12,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), num_class_embeds=3,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    inputs = {
        "sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([3, 70]), "class_labels": torch.tensor([2, 0]),
        "encoder_hidden_states": torch.randn(2, 5, 12),
    }  # fmt: skip
    return model, inputs, ["to_q", "to_v", "conv1", "conv_shortcut", "conv_in", "class_embedding", "conv"]


def resnet():
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 2], layer_type="basic", num_labels=3
    )
    model = transformers.ResNetForImageClassification(config)
    return model, {"pixel_values": torch.randn(2, 3, 20, 20)}, ["convolution"]


def output(model, inputs):
    return next(iter(model(**inputs).values()))


@pytest.mark.parametrize("make", [unet, resnet])
def test_train_merge_save_load_export(make, tmp_path, caplog):
    model, inputs, targets = make()
    model.eval()
    fresh, plain_model = copy.deepcopy(model), copy.deepcopy(model)
    plain = output(model, inputs)
    adapter = ul.attach(model, ul.UniLoRAConfig(r=2, d=300, target_modules=targets, init_bound=0.3))
    kinds = {type(layer).__name__ for layer in adapter.layers.values()}
    assert kinds == ({"UniLoRAConv2d", "UniLoRALinear", "UniLoRAEmbedding"} if make is unet else {"UniLoRAConv2d"})
    optimizer = torch.optim.SGD([adapter.theta_d], 1e-2)
    output(model, inputs).square().mean().backward()
    assert adapter.theta_d.grad.abs().sum() > 0 and "not called" not in caplog.text
    optimizer.step()

    with torch.no_grad():
        y = output(model, inputs)
        assert (y - plain).abs().max() > 1e-4
        adapter.save(tmp_path / "a")
        ul.load(fresh, tmp_path / "a")
        torch.testing.assert_close(output(fresh, inputs), y)
        adapter.merge()
        torch.testing.assert_close(output(model, inputs), y, rtol=1e-3, atol=1e-4)
        adapter.unmerge()
        assert torch.equal(output(model, inputs), y)

        peft = pytest.importorskip("peft")
        adapter.export_lora(tmp_path / "lora")
        theirs = peft.PeftModel.from_pretrained(plain_model, tmp_path / "lora").eval()
        torch.testing.assert_close(output(theirs, inputs), y, rtol=1e-3, atol=1e-4)
        assert torch.equal(output(adapter.detach(), inputs), plain)


def test_all_linear_says_that_it_leaves_experts_out(caplog):
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    share = 100 * experts / sum(p.numel() for p in model.parameters())
    adapter = ul.attach(model, ul.UniLoRAConfig(r=2, d=30))
    assert f"leaves out {share:.0f} %" in caplog.text
    assert "experts.down_proj, experts.gate_up_proj" in caplog.text
    assert {name.rpartition(".")[2] for name in adapter.layers} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_all_linear_is_silent_where_convolutions_are_left_out(caplog):
    model, _, _ = unet()
    ul.attach(model, ul.UniLoRAConfig(r=2, d=300))
    assert "leaves out" not in caplog.text


def test_timm(tmp_path):
    """A vision transformer of timm: trained, saved, loaded, merged. (timm needs a torchvision that fits torch.)"""
    timm = pytest.importorskip("timm", exc_type=ImportError)
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = timm.models.VisionTransformer(**options).eval()
    plain, x = copy.deepcopy(model), torch.randn(2, 3, 32, 32)
    config = ul.UniLoRAConfig(r=2, d=100, target_modules=["qkv", "patch_embed.proj"], init_bound=0.3)
    adapter = ul.attach(model, config)
    model(x).square().sum().backward()
    assert adapter.theta_d.grad.count_nonzero() > 90
    adapter.save(tmp_path)
    ul.load(plain, tmp_path)
    assert torch.equal(plain(x), model(x))
    torch.testing.assert_close(adapter.detach(merge=True)(x), plain(x), rtol=1e-4, atol=1e-4)
