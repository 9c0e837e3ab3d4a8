"""Layers that a model reads instead of calling: refused where known, named after the first forward where not, and
called after all in torch's own encoder."""

import copy
import pickle
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import Tower, dense_update, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

import unilora_ext as ul

CONFIG = ul.UniLoRAConfig(r=2, d=40, target_modules=["up", "down"], seed=5, init_bound=0.5)


def wavlm():
    from transformers import WavLMConfig, WavLMModel

    config = WavLMConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, conv_dim=(8, 8),
        conv_stride=(4, 2), conv_kernel=(8, 2), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, apply_spec_augment=False, layerdrop=0.0,
    )  # fmt: skip
    return WavLMModel(config), {"input_values": torch.randn(2, 400)}


def mamba(kind="Mamba"):
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=50, hidden_size=12, num_hidden_layers=2, state_size=4, time_step_rank=3, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return getattr(transformers, f"{kind}Model")(config), {"input_ids": tokens()}


def jamba():
    from transformers import JambaConfig, JambaModel

    config = JambaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, attn_layer_offset=1, attn_layer_period=2, num_experts=1, num_experts_per_tok=1,
        mamba_d_state=4, mamba_dt_rank=3, use_mamba_kernels=False,
    )  # fmt: skip
    return JambaModel(config), {"input_ids": tokens()}


def detr_map():
    from transformers.models.detr.modeling_detr import DetrMHAttentionMap

    return nn.ModuleDict({"map": DetrMHAttentionMap(8, 2)}), None


READERS = {
    "WavLM": (wavlm, ["q_proj", "k_proj", "v_proj", "out_proj"]),
    "Mamba": (mamba, ["dt_proj"]),
    "FalconMamba": (lambda: mamba("FalconMamba"), ["dt_proj"]),
    "Jamba": (jamba, ["dt_proj"]),
    "DETR": (detr_map, ["map.k_proj"]),
}


READ_BY_KERNELS = {"Mamba": ["x_proj", "out_proj"], "FalconMamba": ["x_proj", "out_proj"]}
"""In training on a GPU with mamba_ssm."""


def output(model, inputs):
    return model(**inputs).last_hidden_state


def read_layers(model, children):
    return {name: module for name, module in model.named_modules() if name.rpartition(".")[2] in children}


@pytest.fixture
def warnings(caplog):
    """What was said of layers that were not called."""
    return lambda: [
        r.getMessage() for r in caplog.records if r.name == "unilora_ext" and "not called" in r.getMessage()
    ]


@pytest.mark.parametrize("kind", READERS)
def test_known_readers_are_refused(kind):
    model = READERS[kind][0]()[0]
    before = [type(module) for module in model.modules()]
    for child in READERS[kind][1]:
        with pytest.raises(ul.AttachError, match=rf"{child}' \(\w+\) cannot be adapted: .* reads its weight instead"):
            ul.attach(model, ul.UniLoRAConfig(r=1, d=8, target_modules=[child]))
    assert [type(module) for module in model.modules()] == before and not hasattr(model, "unilora")


@pytest.mark.parametrize("kind", [kind for kind in READERS if kind != "DETR"])
def test_all_linear_leaves_known_readers_out(kind, warnings):
    make, children = READERS[kind]
    model, inputs = make()
    model.double()
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    adapter = ul.attach(model, ul.UniLoRAConfig(r=2, d=64, target_modules="all-linear", init_bound=0.3))
    readers = set(read_layers(model, children + READ_BY_KERNELS.get(kind, [])))
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert readers and set(adapter.layers) == linear - readers

    model.eval()
    with torch.enable_grad():
        adapted = output(model, inputs)
    assert not warnings()  # every adapted layer was called
    gradient = torch.autograd.grad(adapted.square().sum(), adapter.theta_d)[0]
    assert gradient.abs().sum() > 0
    with adapter.disable():
        assert (output(model, inputs) - adapted).abs().max() > 1e-4
    adapter.merge()
    torch.testing.assert_close(output(model, inputs), adapted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", [kind for kind in READERS if kind != "DETR"])
def test_layers_of_known_readers_are_never_called(kind):
    """What the refusal rests on, in the installed Transformers."""
    make, children = READERS[kind]
    model, inputs = make()
    called = []
    for name, module in read_layers(model, children).items():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    output(model.train(), inputs).square().sum().backward()
    assert not called and all(module.weight.grad is not None for module in read_layers(model, children).values())


@pytest.mark.parametrize("kind", READ_BY_KERNELS)
def test_layers_that_fused_kernels_read_are_refused(kind, monkeypatch):
    """In training they are read, as a stand-in for the kernel shows, and in evaluation called."""
    model = READERS[kind][0]()[0]
    children = READ_BY_KERNELS[kind]
    for child in children:
        with pytest.raises(ul.AttachError, match=rf"{child}' .* in training with fused kernels, reads its weight"):
            ul.attach(model, ul.UniLoRAConfig(r=1, d=8, target_modules=[child]))

    def kernel(xz, *args, **kwargs):
        read = [weight for weight in args if weight is not None]
        assert all(any(t is module.weight for t in read) for module in read_layers(mixer, children).values())
        return xz.new_zeros(len(xz), xz.shape[2], mixer.out_proj.out_features)

    called, mixer = set(), next(m for m in model.modules() if hasattr(m, "x_proj"))
    for name, module in read_layers(mixer, children).items():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    monkeypatch.setattr(sys.modules[type(mixer).__module__], "mamba_inner_fn", kernel)
    x = torch.randn(2, 5, mixer.in_proj.in_features)
    mixer.train()(x)
    assert not called
    mixer.eval()(x)
    assert called == set(children)


def test_every_layer_that_fused_kernels_read_is_known():
    """The classes of the installed version that give a kernel the weight of a layer in training."""
    import transformers

    from unilora_ext.uncalled import _READ_BY_KERNELS

    found = {}
    for path in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        text = path.read_text("utf-8")
        for name, body in re.findall(r"^class (\w+)\(.*?\):\n((?:[ #].*\n|\n)*)", text, re.MULTILINE):
            layers = re.findall(r"^ +(?:outproj_weight=)?self\.(out_proj|x_proj)\.weight,$", body, re.MULTILINE)
            if layers and "mamba" in body:
                found[name] = tuple(sorted(set(layers)))
    assert found == _READ_BY_KERNELS


def test_every_known_reader_is_in_transformers():
    """The table names classes and layers of the installed version."""
    import transformers

    from unilora_ext.uncalled import _READ_IN_TRANSFORMERS

    models = Path(transformers.__file__).parent / "models"
    found = {}
    for path in models.glob("*/modeling_*.py"):
        for name, body in re.findall(
            r"^class (\w+)\(.*?\):\n((?:[ #].*\n|\n)*)", path.read_text("utf-8"), re.MULTILINE
        ):
            if name in _READ_IN_TRANSFORMERS:
                found.setdefault(name, []).append(set(re.findall(r"self\.(\w+) = nn\.Linear\(", body)))
    assert found.keys() == _READ_IN_TRANSFORMERS.keys()
    for name, linears in found.items():
        assert all(set(_READ_IN_TRANSFORMERS[name]) <= layers for layers in linears), name


def test_a_class_of_the_same_name_elsewhere_is_adapted():
    class MambaMixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.dt_proj = nn.Linear(3, 5)

        def forward(self, x):
            return self.dt_proj(x)

    adapter = ul.attach(nn.Sequential(MambaMixer()), ul.UniLoRAConfig(r=1, d=4, target_modules=["dt_proj"]))
    assert list(adapter.layers) == ["0.dt_proj"]


def test_quantised_mixers_call_their_layer():
    """FalconMamba and Jamba call dt_proj where the configuration says that the model is quantised."""
    for model, inputs in (mamba("FalconMamba"), jamba()):
        for module in model.modules():
            if hasattr(module, "config"):
                module.config._is_quantized = True
        adapter = ul.attach(model, ul.UniLoRAConfig(r=2, d=16, target_modules=["dt_proj"], init_bound=1.0))
        output(model, inputs).square().sum().backward()
        assert adapter.theta_d.grad.abs().sum() > 0


class Reader(nn.Module):
    """Reads the weights of `read`, calls `called`."""

    def __init__(self, width: int = 7) -> None:
        super().__init__()
        self.called, self.read = nn.Linear(width, width), nn.Linear(width, width)
        self.checkpointing = False

    def forward(self, x):
        y = x + F.linear(x, self.read.weight, self.read.bias)
        return checkpoint(self.called, y, use_reentrant=False) if self.checkpointing else self.called(y)


READER = ul.UniLoRAConfig(r=2, d=20, target_modules="all-linear", init_bound=0.5)


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_that_is_read_is_named_once(warnings, training):
    model = nn.Sequential(Reader(), Reader()).train(training)
    adapter = ul.attach(model, READER)
    x = torch.randn(3, 7)
    with torch.no_grad():
        model(x)
    assert not warnings()
    model(x).square().sum().backward()
    (message,) = warnings()
    assert message.startswith("2 of 4 adapted layers") and "'0.read', '1.read'. " in message
    assert "called'" not in message
    for _ in range(2):
        model.train()(x).square().sum().backward()
    assert len(warnings()) == 1 and adapter.vector.asked is None


@pytest.mark.parametrize("mode", [None, "reentrant", "non-reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_layers_that_are_called_are_not_named(warnings, mode, dropout):
    model = Tower()
    ul.attach(model, ul.UniLoRAConfig(r=2, d=40, target_modules=["up", "down"], dropout=dropout))
    model.checkpointing = mode
    for _ in range(2):
        model(tokens()).square().sum().backward()
    assert not warnings()


def test_a_checkpointed_call_counts_and_a_read_beside_it_does_not(warnings):
    model = nn.Sequential(Reader())
    ul.attach(model, READER)
    model[0].checkpointing = True
    model(torch.randn(3, 7)).square().sum().backward()
    assert warnings()[0].startswith("1 of 2 ") and "'0.read'. " in warnings()[0]


def test_nothing_is_left_on_the_model_after_the_first_forward():
    model = nn.Sequential(Reader())
    adapter = ul.attach(model, READER)
    model(torch.randn(3, 7)).sum().backward()
    assert (len(model._forward_pre_hooks), len(model._forward_hooks)) == (1, 1)
    adapter.detach()
    assert not model._forward_pre_hooks and not model._forward_hooks


@pytest.mark.parametrize("when", ["merged", "off", "frozen", "raised"])
def test_forwards_that_cannot_tell_are_passed_over(warnings, when):
    model = nn.Sequential(Reader())
    adapter = ul.attach(model, READER)
    x = torch.randn(3, 7, requires_grad=True)
    if when == "merged":
        adapter.merge()
        model(x)
        adapter.unmerge()
    elif when == "off":
        with adapter.disable():
            model(x)
    elif when == "frozen":
        adapter.theta_d.requires_grad_(False)
        model(x)
        adapter.theta_d.requires_grad_(True)
    else:
        with pytest.raises(RuntimeError):
            model(torch.randn(3, 8))
    assert not warnings()
    model(x)
    assert warnings()[0].startswith("1 of 2 ") and "'0.read'. " in warnings()[0]


def test_a_copy_watches_for_itself(warnings):
    model = nn.Sequential(Reader())
    ul.attach(model, READER)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        before = len(warnings())
        twin(torch.randn(3, 7))
        twin(torch.randn(3, 7))
        assert len(warnings()) == before + 1
        assert len(twin._forward_hooks) == 1


def test_an_update_beside_another_kind_of_layer_is_watched_too(warnings):
    class Own(nn.Linear):
        pass

    model = nn.Sequential(Reader())
    model[0].read, model[0].called = Own(7, 7), Own(7, 7)
    ul.attach(model, READER)
    model(torch.randn(3, 7))
    assert warnings()[0].startswith("1 of 2 ") and "'0.read'. " in warnings()[0]


@pytest.mark.parametrize("what", ["model", "block", "wrapped block", "forward"])
def test_compiled_layers_are_not_named(warnings, what):
    model = Tower(depth=2)
    ul.attach(model, CONFIG)
    run, block = model, model.blocks[1]
    if what == "model":
        run = torch.compile(model, backend="eager")
    elif what == "block":
        block.compile(backend="eager")
    elif what == "wrapped block":
        model.blocks[1] = torch.compile(block, backend="eager")
    else:
        block.forward = torch.compile(block.forward, backend="eager")
    for _ in range(2):
        run(tokens()).square().sum().backward()
    assert not warnings()


# ---- torch.nn.TransformerEncoder in evaluation ----------------------------------------------------------------------


def encoder(norm_first, batch_first, activation="relu"):
    layer = nn.TransformerEncoderLayer(
        16, 2, 24, activation=activation, norm_first=norm_first, batch_first=batch_first
    ).double()
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=not norm_first and batch_first)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)  # the layers of an encoder start as copies
    return model.eval()


def dense_copy(model, adapter):
    """The model with W + s B A as its weights, in plain modules."""
    plain = copy.deepcopy(model)
    ul.get_adapter(plain).detach()
    for name, update in dense_update(model, adapter).items():
        plain.get_submodule(name).weight.data += update
    return plain


@pytest.fixture
def no_fast_path():
    """Turns torch's fused path off, and on again at the end."""
    yield lambda: torch.backends.mha.set_fastpath_enabled(False)
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize(("norm_first", "batch_first"), [(False, True), (True, True), (False, False), (True, False)])
@pytest.mark.parametrize("targets", [["linear1", "linear2"], ["layers.1.linear2"]])
def test_transformer_encoder_with_a_padding_mask(norm_first, batch_first, targets, mode, no_fast_path):
    model = encoder(norm_first, batch_first)
    adapter = ul.attach(model, ul.UniLoRAConfig(r=2, d=30, target_modules=targets, init_bound=0.7))
    x = torch.randn(4, 6, 16, dtype=torch.float64)
    lengths = torch.tensor([6, 3, 1, 5])
    padded = torch.arange(6) >= lengths[:, None]

    def run(model):
        y = model(x if batch_first else x.transpose(0, 1), src_key_padding_mask=padded)
        return (y if batch_first else y.transpose(0, 1))[~padded]

    plain = dense_copy(model, adapter)
    with mode():
        adapted = run(model)
        with adapter.disable():
            base = run(model)
    no_fast_path()
    with torch.no_grad():
        expected = run(plain)
    torch.testing.assert_close(adapted, expected, rtol=1e-9, atol=1e-9)
    assert (base - expected).abs().max() > 1e-3
    adapter.merge()
    torch.testing.assert_close(run(model), expected, rtol=1e-9, atol=1e-9)


def test_a_layer_made_by_hand_in_an_encoder_layer(no_fast_path):
    layer = encoder(False, True).layers[0]
    layer.linear1 = ul.UniLoRALinear.from_linear(layer.linear1, r=2, d=20, init_bound=1.0)
    x = torch.randn(4, 6, 16, dtype=torch.float64)
    with torch.no_grad():
        y = layer(x)
        no_fast_path()
        torch.testing.assert_close(y, layer(x), rtol=1e-9, atol=1e-9)


def test_encoders_use_nested_tensors_again_after_detach():
    model = nn.ModuleDict({"adapted": encoder(False, True), "other": encoder(False, True)})
    adapter = ul.attach(model, ul.UniLoRAConfig(r=2, d=30, target_modules=["adapted.layers.2.linear1"]))
    assert not model["adapted"].use_nested_tensor and model["other"].use_nested_tensor
    twin = copy.deepcopy(model)
    adapter.detach()
    assert model["adapted"].use_nested_tensor and not twin["adapted"].use_nested_tensor
    ul.get_adapter(twin).detach()
    assert twin["adapted"].use_nested_tensor
