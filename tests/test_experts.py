"""Stacked experts of Transformers as targets: against the model's own forward with W_e + s B_e A_e."""

import copy
import pickle

import pytest
import torch
from models import assert_unchanged, snapshot

import unilora_ext as ul
from unilora_ext.experts import ExpertsLayer

transformers = pytest.importorskip("transformers")
E, HIDDEN, INNER, R = 5, 16, 12, 2


def small(kind, **changes):
    sizes = dict(
        vocab_size=20, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_experts_per_tok=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    if kind == "Qwen3Moe":
        sizes |= {"num_experts": E, "moe_intermediate_size": INNER, "decoder_sparse_step": 1, "mlp_only_layers": []}
    else:
        sizes["num_local_experts"] = E
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).double().eval()
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def config(**changes):
    return ul.UniLoRAConfig(
        **{"r": R, "d": 97, "target_modules": ["experts", "q_proj"], "alpha": 3.0, "init_bound": 0.4, **changes}
    )


def ids():
    return torch.randint(3, 20, (2, 7))


def updated(model, adapter, theta_d):
    """The weights of experts and q_proj with their updates by the definition, differentiable in theta_d, by name."""
    theta_D, start, weights = adapter.projection.dense() @ theta_d, 0, {}
    for name, layer in adapter.layers.items():
        m, n = adapter.vector.layout.shapes[layer._unilora.slot_id]
        B, A = theta_D[start : start + m * R].view(m, R), theta_D[start + m * R : start + (m + n) * R].view(R, n)
        start += (m + n) * R
        if name.endswith("q_proj"):
            weights[f"{name}.weight"] = layer.weight + 1.5 * B @ A
            continue
        row = column = 0
        for part in ("gate_up_proj", "down_proj"):
            weight = getattr(layer, part)
            own = weight.transpose(1, 2) if layer.is_transposed else weight
            _, m, n = own.shape
            deltas = []
            for _ in range(E):
                deltas.append(1.5 * B[row : row + m] @ A[:, column : column + n])
                row, column = row + m, column + n
            total = own + torch.stack(deltas)
            weights[f"{name}.{part}"] = total.transpose(1, 2) if layer.is_transposed else total
    assert start == adapter.projection.D
    return weights


KINDS = ["Mixtral", "Qwen3Moe", "GptOss"]


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_gradient_are_those_of_the_updated_weights(kind, implementation):
    model, x = small(kind), ids()
    model.set_experts_implementation(implementation)
    loose = {"rtol": 1e-8, "atol": 1e-8}
    if implementation == "grouped_mm":  # not in float64
        model, loose = model.float(), {"rtol": 1e-3, "atol": 1e-3}
    plain = copy.deepcopy(model)
    adapter = ul.attach(model, config())
    assert isinstance(model.model.layers[1].mlp.experts, ExpertsLayer)
    y = model(x).logits
    weights = torch.randn_like(y)
    (gradient,) = torch.autograd.grad((y * weights).sum(), adapter.theta_d)

    theta_d = adapter.theta_d.detach().clone().requires_grad_()
    changed = {name: weight.to(y.dtype) for name, weight in updated(model, adapter, theta_d.double()).items()}
    oracle = torch.func.functional_call(plain, changed, (x,)).logits
    torch.testing.assert_close(y, oracle, **loose)
    (wanted,) = torch.autograd.grad((oracle * weights).sum(), theta_d)
    torch.testing.assert_close(gradient, wanted, **loose)
    with adapter.disable():
        assert torch.equal(model(x).logits, plain(x).logits)
    assert (y - plain(x).logits).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_merge_unmerge_and_detach(kind):
    model, x = small(kind), ids()
    before = snapshot(model)
    adapter = ul.attach(model, config())
    y, weights = model(x).logits, updated(model, adapter, adapter.theta_d)
    adapter.merge()
    torch.testing.assert_close(model(x).logits, y, rtol=1e-8, atol=1e-8)
    for name, weight in weights.items():
        torch.testing.assert_close(model.get_parameter(name), weight, rtol=1e-12, atol=1e-12, check_dtype=True)
    with pytest.raises(ul.UniLoRAError, match=r"load_state_dict: '.*' would replace a weight that has the update"):
        model.load_state_dict({k: v for k, v in before["state"].items()}, strict=False)
    adapter.unmerge()
    torch.testing.assert_close(model(x).logits, y, rtol=0, atol=0)
    adapter.detach()
    assert_unchanged(model, before)


def test_a_write_to_a_merged_stack_is_seen():
    model = small("Mixtral")
    adapter = ul.attach(model, config())
    adapter.merge()
    with torch.no_grad():
        model.model.layers[0].mlp.experts.gate_up_proj[2, 1, 1] += 1
    with pytest.raises(ul.UniLoRAError, match=r"written after merge.*'model.layers.0.mlp.experts'"):
        adapter.unmerge()


def test_a_sum_that_is_not_finite_leaves_all_as_it_was():
    model = small("Mixtral").half()
    adapter = ul.attach(model, config())
    with torch.no_grad():
        adapter.theta_d.fill_(1e4)
    before = snapshot(model)
    with pytest.raises(ul.UniLoRAError, match="not finite"):
        adapter.merge()
    assert_unchanged(model, before)


def test_save_and_load(tmp_path):
    model, x = small("GptOss"), ids()
    fresh = copy.deepcopy(model)
    adapter = ul.attach(model, config(target_modules=r".*\.experts"))
    adapter.save(tmp_path / "a")
    M, N = E * (2 * INNER + HIDDEN), E * (HIDDEN + INNER)
    assert [list(m) for m in ul.read(tmp_path / "a").modules] == [
        [f"model.layers.{i}.mlp.experts", M, N] for i in range(2)
    ]
    ul.load(fresh, tmp_path / "a")
    assert torch.equal(fresh(x).logits, model(x).logits)


@pytest.mark.parametrize("projection", ["vera", "identity", "gaussian", "fastfood", "peft"])
def test_the_family(projection):
    model, x = small("Mixtral"), ids()
    adapter = ul.attach(
        model, config(projection=projection, d=40 if projection in ("gaussian", "fastfood", "peft") else None,
                      init_bound=None)
    )  # fmt: skip
    with torch.no_grad():
        adapter.theta_d.copy_(0.3 * torch.randn_like(adapter.theta_d))
    y = model(x).logits
    y.square().sum().backward()
    assert adapter.theta_d.grad.abs().sum() > 0
    adapter.merge()
    torch.testing.assert_close(model(x).logits, y, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    "projection, message",
    [
        ("loraxs", "expected a plain floating weight"),
        ("fourierft", "expected a projection to A and B, got 'fourierft'"),
    ],
)
def test_projections_of_one_matrix_are_refused(projection, message):
    model = small("Mixtral")
    before = snapshot(model)
    with pytest.raises(ul.AttachError, match=message):
        ul.attach(model, config(projection=projection, d=None, init_bound=None, target_modules=["experts"]))
    assert_unchanged(model, before)


def test_checkpointing_bfloat16_and_dropout():
    model, x = small("Mixtral"), ids()
    adapter = ul.attach(model.train(), config())
    model(x).logits.square().sum().backward()
    wanted, adapter.theta_d.grad = adapter.theta_d.grad, None
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(x).logits.square().sum().backward()
    torch.testing.assert_close(adapter.theta_d.grad, wanted)
    model.gradient_checkpointing_disable()
    y = model(x).logits
    low = model.model.layers[0].mlp.experts.bfloat16()
    args = torch.randn(6, HIDDEN), torch.randint(0, E, (6, 2)), torch.rand(6, 2)
    out = low(args[0].bfloat16(), args[1], args[2].bfloat16())
    torch.testing.assert_close(
        out.double(), low.double()(args[0].double(), args[1], args[2].double()), rtol=0.1, atol=0.1
    )
    assert out.dtype == torch.bfloat16 and y.dtype == torch.float64
    for layer in adapter.layers.values():
        layer._unilora.dropout = 0.5
    assert (model(x).logits - model(x).logits).abs().max() > 1e-4
    model.eval()
    assert torch.equal(model(x).logits, model(x).logits)


def test_experts_without_tokens_and_copies():
    model = small("Mixtral")
    ul.attach(model, config(target_modules=["experts"]))
    layer = model.model.layers[0].mlp.experts
    x = torch.randn(3, HIDDEN, dtype=torch.float64)
    none = layer(x[:0], torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2, dtype=torch.float64))
    assert none.shape == (0, HIDDEN)
    chosen, shares = torch.tensor([[1, 1], [4, 0], [2, 1]]), torch.rand(3, 2, dtype=torch.float64)
    beyond = layer(x, torch.where(chosen == 4, E, chosen), shares)
    shares_without_4 = torch.where(chosen == 4, 0.0, shares)
    torch.testing.assert_close(beyond, layer(x, chosen, shares_without_4))
    again = pickle.loads(pickle.dumps(layer))
    assert type(again) is type(layer) and type(copy.deepcopy(model).model.layers[0].mlp.experts) is type(layer)
    torch.testing.assert_close(again(x, chosen, shares), layer(x, chosen, shares))


@pytest.mark.parametrize("targets", [["experts", "q_proj"], ["experts"]])
@pytest.mark.parametrize("kind", KINDS)
def test_export_is_pefts_lora_of_parameters(kind, targets, tmp_path):
    peft = pytest.importorskip("peft")
    model, x = small(kind).float(), ids()
    plain = copy.deepcopy(model)
    adapter = ul.attach(model, config(target_modules=targets))
    adapter.export_lora(tmp_path / "lora")
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "lora").eval()
    with torch.no_grad():
        y = model(x).logits
        with adapter.disable():
            effect = (model(x).logits - y).abs().max()
        assert (theirs(x).logits - y).abs().max() < 0.01 * effect


@pytest.mark.parametrize("what", ["_is_expert_parallel", "has_post_expert_norm"])
def test_what_is_not_known_is_refused(what):
    model = small("Mixtral")
    setattr(model.model.layers[1].mlp.experts, what, True)
    with pytest.raises(ul.AttachError, match=r"layers.1.mlp.experts' \(MixtralExperts\) cannot be adapted: it"):
        ul.attach(model, config())


def test_other_stacks_are_refused():
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = torch.nn.Parameter(torch.randn(3, 4, 5))

    with pytest.raises(ul.AttachError, match=r"'0' \(Own\) cannot be adapted"):
        ul.attach(torch.nn.Sequential(Own()), config(target_modules=["0"]))


def test_compiles_in_parts():
    torch.compiler.reset()  # the graphs of other tests count
    model, x = small("Mixtral").float(), ids()
    adapter = ul.attach(model, config())
    y = model(x).logits
    (wanted,) = torch.autograd.grad(y.square().sum(), adapter.theta_d)
    got = torch.compile(model, backend="aot_eager")(x).logits
    torch.testing.assert_close(got, y, rtol=1e-4, atol=1e-4)
    gradient = torch.autograd.grad(got.square().sum(), adapter.theta_d)[0]
    torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-2)
