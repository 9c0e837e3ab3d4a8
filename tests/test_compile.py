"""torch.compile with fullgraph, and torch.export, of adapted models: equal to eager, traced once."""

import copy

import pytest
import torch
from models import Tower, tokens
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import unilora_ext as ul
from unilora_ext import functional

CONFIG = ul.UniLoRAConfig(r=3, d=64, target_modules=["up", "down"], modules_to_save=["head"], alpha=1.5, init_bound=0.5)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def result(call, model, x):
    """Output and gradients of one step."""
    model.zero_grad()
    y = call(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("projection", "materialize"), [("uniform", True), ("balanced", False)])
def test_equal_to_eager_and_traced_once(projection, materialize):
    """Steps that change theta_d, and batches of other sizes, are one graph; so are no_grad and evaluation apart."""
    model = Tower()
    adapter = ul.attach(
        model, ul.UniLoRAConfig(**{**vars(CONFIG), "projection": projection, "materialize": materialize})
    )
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for batch in (6, 4, 9, 6):
        x = tokens(batch)
        assert_same(result(compiled, model, x), result(model, model, x))
        frames.append(counter.frame_count)
        with torch.no_grad():
            adapter.theta_d.add_(0.1 * torch.randn_like(adapter.theta_d))
    assert frames == frames[:1] * 4
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


def test_inductor():
    model, x = Tower(), tokens()
    ul.attach(model, CONFIG)
    assert_same(result(torch.compile(model, fullgraph=True), model, x), result(model, model, x))


def test_one_projection_a_forward():
    model = Tower()
    ul.attach(model, CONFIG)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compile(model, fullgraph=True, backend=keep)(tokens())
    called = [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert called.count("unilora.project") + called.count("unilora.project.default") == 1
    assert called.count("unilora.lora_linear") + called.count("unilora.lora_linear.default") == 6


def test_turned_off_merged_and_detached_graphs():
    model, x = Tower(), tokens()
    with torch.no_grad():
        before = model(x)
    adapter = ul.attach(model, CONFIG)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        adapted = compiled(x)
        assert not torch.allclose(adapted, before)
        with adapter.disable():
            torch.testing.assert_close(compiled(x), before)
        torch.testing.assert_close(compiled(x), adapted)
        adapter.merge()
        torch.testing.assert_close(compiled(x), adapted, rtol=1e-4, atol=1e-4)
        adapter.unmerge()
        adapter.detach()
        torch.testing.assert_close(compiled(x), before)


def test_two_models_do_not_share_a_graph_constant():
    """Same code, other seeds: the index is a constant of a graph, so each model needs its own."""
    models = [Tower(), Tower()]
    for seed, model in enumerate(models):
        ul.attach(model, ul.UniLoRAConfig(**{**vars(CONFIG), "seed": seed}))
    x = tokens()
    for model in models:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_same(result(compiled, model, x), result(model, model, x))


def test_a_compiled_part_of_an_eager_model():
    model, x = Tower(), tokens()
    ul.attach(model, CONFIG)
    expected = result(model, model, x)
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    assert_same(result(model, model, x), expected)


def test_layers_alone_autocast_and_dropout():
    layer = ul.UniLoRALinear(12, 9, r=2, d=17, init_bound=1.0)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 12)
    assert_same(result(compiled, layer, x), result(layer, layer, x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compiled(x).dtype == torch.bfloat16
        torch.testing.assert_close(compiled(x), layer(x), rtol=0.02, atol=0.02)
    dropped = ul.UniLoRALinear(12, 9, r=2, d=17, dropout=0.5, init_bound=1.0)
    compiled = torch.compile(dropped, fullgraph=True, backend="aot_eager")
    assert not torch.equal(compiled(x), compiled(x))
    dropped.eval()
    torch.testing.assert_close(compiled(x), dropped(x))


def test_activation_checkpointing():
    model, x = Tower(), tokens()
    ul.attach(model, CONFIG)
    expected = result(model, model, x)
    model.checkpointing = "non-reentrant"
    assert_same(result(torch.compile(model, fullgraph=True, backend="aot_eager"), model, x), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_transformers_model(checkpointing):
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37)
    dropout = dict(use_cache=False, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, **dropout)).train()
    ul.attach(model, ul.UniLoRAConfig(r=3, d=64, target_modules="all-linear", modules_to_save=["classifier"]))
    x = torch.randint(0, 50, (3, 7))
    expected = result(lambda x: model(input_ids=x).logits, model, x)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.disable_input_require_grads()  # its hook breaks a graph, and only reentrant checkpointing needs it
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(result(lambda x: compiled(input_ids=x).logits, model, x), expected)


def test_graph_breaks_and_another_adapter_under_the_same_compiled_model():
    class Broken(Tower):
        def forward(self, tokens):
            x = self.embed(tokens)
            for block in self.blocks:
                x = block(x)
                torch._dynamo.graph_break()
            return self.head(x.mean(1))

    for model in (Broken(), Tower()):
        compiled, x = torch.compile(model, backend="aot_eager"), tokens()
        for seed in range(3):
            adapter = ul.attach(model, ul.UniLoRAConfig(**{**vars(CONFIG), "seed": seed}))
            assert_same(result(compiled, model, x), result(model, model, x))
            adapter.detach()


def test_half_precision():
    model, x = Tower().bfloat16(), tokens()
    ul.attach(model, CONFIG)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_graph_projects_in_the_dtype_of_the_layers(autocast):
    """One projection for each: two of the layers are in float64, or all in bfloat16 under autocast."""
    model, x, dtypes = Tower(), tokens(), []
    if not autocast:
        model.blocks[0] = Float64(model.blocks[0].double())
    ul.attach(model, CONFIG)

    def backend(module, _):
        for node in module.graph.nodes:
            if node.target in (torch.ops.unilora.project, torch.ops.unilora.project.default):
                dtypes.append(node.args[-1])
        return module

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = model(x)
        got = torch.compile(model, fullgraph=True, backend=backend)(x)
    torch.testing.assert_close(got, expected)
    assert sorted(dtypes, key=str) == ([torch.bfloat16] if autocast else [torch.float32, torch.float64])


def test_a_part_without_autocast_in_a_graph_with_it():
    """Its factors are not those that were rounded for the others."""

    class Whole(torch.nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return self.block(x.float())

    model, x = Tower(), tokens()
    model.blocks[1] = Whole(model.blocks[1])
    adapter = ul.attach(model, CONFIG)
    with torch.no_grad():
        adapter.theta_d.normal_()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), expected, rtol=0, atol=0)


class Float64(torch.nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(x.double()).float()


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_an_adapted_and_of_a_merged_model(strict):
    model, x = Tower().eval(), tokens()
    adapter = ul.attach(model, CONFIG)
    batch = torch.export.Dim("batch", min=2)
    with torch.no_grad():
        expected = model(x)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=strict)
    other = tokens(11)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), expected)
        torch.testing.assert_close(program.module()(other), model(other))
    adapter.merge()
    plain = copy.deepcopy(model)
    ul.get_adapter(plain).detach(merge=True)
    for merged in (model, plain):
        program = torch.export.export(merged, (x,), dynamic_shapes=({0: batch},), strict=strict)
        torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-4)


def test_an_exported_program_survives_its_file(tmp_path):
    model, x = Tower().eval(), tokens()
    ul.attach(model, CONFIG)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2")
    torch.testing.assert_close(loaded.module()(x), model(x))


@pytest.mark.cuda
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_cuda_graphs(mode):
    model, x = Tower().cuda(), tokens().cuda()
    ul.attach(model, CONFIG)
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    for _ in range(3):
        assert_same(result(compiled, model, x), result(model, model, x))


def test_a_compiled_update_keeps_h_in_float32():
    """h of a float16 layer may pass 65,504 where the update does not."""
    torch._dynamo.reset()
    x, A, B, y = (
        t.half()
        for t in (torch.full((3, 8), 200.0), torch.full((2, 8), 200.0), torch.full((4, 2), 1e-3), torch.randn(3, 4))
    )
    expected = (y.double() + (x.double() @ A.double().T) @ B.double().T).half()
    assert torch.isfinite(expected).all() and (x.float() @ A.float().T).max() > 65504
    compiled = torch.compile(functional.lora_update, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(y.clone(), x, A, B), functional.lora_update(y.clone(), x, A, B))
    torch.testing.assert_close(compiled(y.clone(), x, A, B), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("materialize", [True, False])
def test_jit_trace(tmp_path, materialize):
    """Right for another input and another theta_d, and after a save."""
    model = torch.nn.Sequential(torch.nn.Linear(7, 12), torch.nn.Tanh(), torch.nn.Linear(12, 3)).eval()
    adapter = ul.attach(model, ul.UniLoRAConfig(r=2, d=9, init_bound=0.5, materialize=materialize))
    traced, x = torch.jit.trace(model, (torch.randn(4, 7),)), torch.randn(5, 7)
    with torch.no_grad():
        adapter.theta_d.mul_(-1.5)
        assert torch.equal(traced(x), model(x))
        traced.save(str(tmp_path / "traced.pt"))
        assert torch.equal(torch.jit.load(str(tmp_path / "traced.pt"))(x), model(x))


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_onnx(dynamo, tmp_path):
    """The merged model, run by ONNX's own reference; an attached one is refused in words that help."""
    reference = pytest.importorskip("onnx.reference")
    pytest.importorskip("onnxscript")
    model, x = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 3)).eval(), torch.randn(4, 7)
    adapter = ul.attach(model, ul.UniLoRAConfig(r=2, d=30, target_modules="all-linear", init_bound=0.5))
    expected, path = model(x).detach(), str(tmp_path / "model.onnx")
    options = {"dynamo": True, "external_data": False, "verbose": False} if dynamo else {"dynamo": False}
    with pytest.raises(Exception, match=r"detach\(merge=True\)") as error:
        torch.onnx.export(model, (x,), path, **options)
    assert dynamo or isinstance(error.value, ul.UniLoRAError)
    assert torch.equal(model(x), expected)
    torch.onnx.export(adapter.detach(merge=True), (x,), path, **options)
    run = reference.ReferenceEvaluator(path)
    got = torch.from_numpy(run.run(None, {run.input_names[0]: x.numpy()})[0])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
