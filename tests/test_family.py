"""Every projection of the family theta_D = c + P theta_d, by the same tests."""

import copy
import io
import math
import pickle
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from models import Block, Tower, tokens
from torch.autograd import gradcheck, gradgradcheck

import unilora_ext as ul
from unilora_ext.config import make_projection
from unilora_ext.family import FAMILY
from unilora_ext.layout import Layout, Order
from unilora_ext.projections import projection_class
from unilora_ext.projections.draws import Draws, Purpose

SHAPES = ((12, 8), (20, 16), (8, 24), (4, 4))


@dataclass(frozen=True)
class Case:
    """A projection: one line of the table.

    Attributes:
        name: of the projection.
        d: None where the sizes give it.
        options: of it.
        drawn: whether P depends on the seed.
    """

    name: str
    d: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    drawn: bool = True

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.options.items())])

    @property
    def kind(self):
        return projection_class(self.name)

    def config(self, r: int, seed: int = 0, **changes) -> ul.UniLoRAConfig:
        return ul.UniLoRAConfig(
            r=r, d=self.d, seed=seed, projection=self.name, projection_options=self.options, **changes
        )


CASES = [
    Case("identity", drawn=False),
    Case("uniform", 23),
    Case("uniform", 23, {"normalize": False}),
    Case("balanced", 23),
    Case("peft", 23),
    Case("local", 23),
    Case("local", 23, {"normalize": False}),
    Case("nonuniform", 23),
    Case("countsketch", 23),
    Case("vera"),
    Case("tied", drawn=False),
    Case("vblora", None, {"num_vectors": 9}, drawn=False),
    Case("vblora", None, {"num_vectors": 9, "topk": 3, "vector_length": 2}, drawn=False),
    Case("loraxs", drawn=False),
    Case("loraxs", None, {"sigma": False}, drawn=False),
    Case("tinylora", None, {"u": 5}),
    Case("tinylora", None, {"u": 4, "groups": 3}),
    Case("gaussian", 23),
    Case("fastfood", 23),
    Case("fastfood", 23, {"gaussian": True}),
    Case("fourierft", None, {"n_frequency": 3}),
    Case("fourierft", None, {"n_frequency": 7, "scale": 10.0}),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)
by_name = {case.name: case for case in reversed(CASES)}
each_seeded = pytest.mark.parametrize("name", [name for name, case in by_name.items() if case.drawn])
each_layout = pytest.mark.parametrize(("shapes", "r"), [(SHAPES, 3), (SHAPES, 1), (((12, 8),), 2)], ids=str)


def random_seed() -> int:
    return int(torch.randint(2**62, ()))


def random_weights(shapes, dtype=torch.float32):
    weights = [torch.randn(shape, dtype=dtype) for shape in shapes]
    return weights.__getitem__


def made(case: Case, shapes=SHAPES, r: int = 3, seed: int | None = None, weights=None, **changes):
    layout = Layout(shapes, r, case.kind.order)
    if case.options.get("groups", 1) > len(shapes):
        case = Case(case.name, case.d, {**case.options, "groups": len(shapes)})
    config = case.config(r, random_seed() if seed is None else seed, **changes)
    return make_projection(config, layout, weights=weights or random_weights(shapes)), layout


def values(P, dtype=torch.float64):
    """Random values of theta_d and the trained parts."""
    return [torch.randn(t.shape, dtype=dtype) for t in P.start(torch.float64).values()]


def test_every_projection_is_here():
    assert {case.name for case in CASES} == set(FAMILY)


# ---- the map ---------------------------------------------------------------------------------------------------------


@each_case
@each_layout
def test_transpose_is_the_adjoint(case, shapes, r):
    P, layout = made(case, shapes, r)
    theta_d, *trained = values(P)
    y = torch.randn(layout.D, dtype=torch.float64)
    difference = P(theta_d, trained=trained) - P.offset(trained=trained)
    assert difference.shape == (layout.D,) and theta_d.shape == (P.d,)
    torch.testing.assert_close(difference @ y, theta_d @ P.transpose(y, trained=trained))


@each_case
@each_layout
def test_it_is_affine(case, shapes, r):
    P, _ = made(case, shapes, r)
    theta_d, *trained = values(P)
    expected = P.offset(trained=trained) + P.dense(trained=trained) @ theta_d
    torch.testing.assert_close(P(theta_d, trained=trained), expected)


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_are_rounded(case, dtype):
    P, _ = made(case)
    theta_d, *trained = values(P)
    result = P(theta_d.to(dtype), dtype, [t.float() for t in trained])
    assert result.dtype == dtype
    exact = P(theta_d.to(dtype).double(), trained=trained)
    torch.testing.assert_close(result.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@each_case
def test_derivatives_are_those_of_finite_differences(case):
    P, _ = made(case, ((8, 4), (4, 12)), 2)
    inputs = [t.requires_grad_() for t in values(P)]
    assert gradcheck(lambda theta_d, *trained: P(theta_d, trained=trained), inputs, fast_mode=True)
    assert gradgradcheck(lambda theta_d, *trained: P(theta_d, trained=trained), inputs, fast_mode=True)


@each_case
def test_some_rows_are_those_of_the_whole(case):
    P, layout = made(case)
    inputs = [t.requires_grad_() for t in values(P)]
    cuts = sorted(torch.randint(layout.D + 1, (4,)).tolist())
    ranges = [tuple(cuts[2:]), tuple(cuts[:2]), layout.range_of(1)]
    ranges = [(start, stop) for start, stop in ranges if start < stop]
    rows = torch.cat([torch.arange(*bounds) for bounds in ranges])
    whole, part = P(inputs[0], trained=inputs[1:])[rows], P.restrict("cpu", ranges).project(inputs[0], None, inputs[1:])
    g = torch.randn(len(rows), dtype=torch.float64)
    torch.testing.assert_close(part, whole, rtol=1e-12, atol=1e-12)
    for got, expected in zip(*(torch.autograd.grad(y @ g, inputs) for y in (part, whole)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@each_case
def test_the_seed_gives_P(case):
    weights, seed = random_weights(SHAPES), random_seed()
    (P, _), (same, _), (other, _) = (
        made(case, seed=s, weights=weights) for s in (seed, seed, seed ^ (1 << int(torch.randint(62, ()))))
    )
    theta_d, *trained = values(P)
    assert torch.equal(P(theta_d, trained=trained), same(theta_d, trained=trained))
    assert torch.equal(P(theta_d, trained=trained), other(theta_d, trained=trained)) != case.drawn
    assert P.spec() == {"name": case.name, "version": P.version, "seed": seed, "options": dict(P.given_options)}


@each_case
def test_copies(case):
    P, _ = made(case)
    theta_d, *trained = values(P)
    again = pickle.loads(pickle.dumps(P))
    assert torch.equal(P(theta_d, trained=trained), again(theta_d, trained=trained))
    assert copy.deepcopy(P) is P


@each_case
def test_a_start_is_drawn_by_the_global_generator(case):
    P, _ = made(case)
    torch.manual_seed(5)
    first = P.start(torch.float32)
    torch.manual_seed(5)
    second = P.start(torch.float32)
    assert list(first) == ["theta_d", *P.trained] == list(P.learning_rates)
    assert all(torch.equal(first[k], second[k]) and first[k].dtype == torch.float32 for k in first)
    if case.kind.start is ul.Projection.start or case.name == "vblora":
        assert float(first["theta_d"].abs().max()) <= 0.02
        assert 1 < float(P.start(torch.float32, 5.0)["theta_d"].abs().max()) <= 5
    else:
        with pytest.raises(ul.UniLoRAError, match="init_bound"):
            P.start(torch.float32, 0.1)


# ---- each from its definition ----------------------------------------------------------------------------------------


def parts_by_module(P, layout, theta_d, sizes):
    """theta_d in parts of `sizes(m, n)` for each module."""
    start = 0
    for m, n in layout.shapes:
        parts = []
        for size in sizes(m, n):
            parts.append(theta_d[start : start + size])
            start += size
        yield parts
    assert start == len(theta_d) == P.d


def flat(B, A):
    return np.concatenate([np.asarray(B).reshape(-1), np.asarray(A).reshape(-1)])


def one_hot(columns, d, normalize=True, values=None):
    P = np.zeros((len(columns), d))
    P[np.arange(len(columns)), columns] = 1 if values is None else values
    return P / np.sqrt(np.maximum((P != 0).sum(0), 1)) if normalize else P


def by_local(P, layout, x, trained, weights):
    L, columns = len(layout), []
    for module in range(L):
        first, last = P.d * module // L, P.d * (module + 1) // L
        drawn = ul.UniformProjection(P.D, last - first, P.seed).index.numpy()
        columns.append(first + drawn[slice(*layout.range_of(module))])
    return one_hot(np.concatenate(columns), P.d, P.given_options["normalize"]) @ x


def by_nonuniform(P, layout, x, trained, weights):
    of_B, columns = round(2 * P.d / 3), np.zeros(P.D, dtype=int)
    drawn_B = ul.UniformProjection(P.D, of_B, P.seed).index.numpy()
    drawn_A = ul.UniformProjection(P.D, P.d - of_B, P.seed).index.numpy()
    for module in range(len(layout)):
        B, A = slice(*layout.range_of_B(module)), slice(*layout.range_of_A(module))
        columns[B], columns[A] = drawn_B[B], of_B + drawn_A[A]
    return one_hot(columns, P.d) @ x


def by_countsketch(P, layout, x, trained, weights):
    columns = ul.UniformProjection(P.D, P.d, P.seed).index.numpy()
    signs = ul.UniformProjection(P.D, 2, P.seed ^ 2**62).index.numpy() * 2 - 1
    return one_hot(columns, P.d, True, signs) @ x


def scaled(P, layout, x, P_A, P_B):
    r = layout.r
    for (m, n), (g, b) in zip(layout.shapes, parts_by_module(P, layout, x, lambda m, n: (r, m)), strict=True):
        yield flat(np.diag(b) @ P_B[:m], np.diag(g) @ P_A[:, :n])


def by_vera(P, layout, x, trained, weights):
    r, m, n = layout.r, max(m for m, _ in layout.shapes), max(n for _, n in layout.shapes)
    of_A, of_B = Draws(P.seed, Purpose.VERA_A), Draws(P.seed, Purpose.VERA_B)
    P_A = np.array([of_A.uniform(k * n, n) for k in range(r)]) * 2 - 1
    P_B = np.array([of_B.uniform(i * r, r) for i in range(m)]) * 2 - 1
    P_A, P_B = (P_A * math.sqrt(6 / n)).astype("float32"), (P_B * math.sqrt(6 / r)).astype("float32")
    return np.concatenate(list(scaled(P, layout, x, P_A, P_B)))


def by_tied(P, layout, x, trained, weights):
    return np.concatenate(list(scaled(P, layout, x, *trained)))


def by_vblora(P, layout, x, trained, weights):
    h, K, r = P.given_options["num_vectors"], P.given_options["topk"], layout.r
    bank, logits, result = x.reshape(h, -1), iter(trained[0]), []
    b = bank.shape[1]
    assert b == (P.given_options["vector_length"] or math.gcd(*(side for shape in layout.shapes for side in shape)))

    def mixture():
        row = next(logits)
        best = sorted(range(h), key=lambda j: -row[j])[:K]
        weights = np.exp(row[best])
        return weights @ bank[best] / weights.sum()

    for m, n in layout.shapes:
        B, A = np.zeros((m, r)), np.zeros((r, n))
        for i in range(m // b):
            for k in range(r):
                B[i * b : (i + 1) * b, k] = mixture()
        for k in range(r):
            for j in range(n // b):
                A[k, j * b : (j + 1) * b] = mixture()
        result.append(flat(B, A))
    assert next(logits, None) is None
    return np.concatenate(result)


def singular(weight, r):
    """U [m, r], S [r], V [n, r] with the sign that makes the largest component of a column of U positive."""
    U, S, Vh = np.linalg.svd(weight.double().numpy())
    signs = [np.sign(u[np.argmax(np.abs(u))]) for u in U.T[:r]]
    return U[:, :r] * signs, S[:r], Vh[:r].T * signs


def by_loraxs(P, layout, x, trained, weights):
    r, result = layout.r, []
    for module, (R,) in enumerate(parts_by_module(P, layout, x, lambda m, n: (r * r,))):
        U, S, V = singular(weights(module), r)
        if P.given_options["sigma"]:
            U = U @ np.diag(S)
        result.append(flat(U @ R.reshape(r, r), V.T))
    return np.concatenate(result)


def by_tinylora(P, layout, x, trained, weights):
    u, groups, L, r, result = P.given_options["u"], P.given_options["groups"], len(layout), layout.r, []
    for module in range(L):
        group = min(module // max(1, L // groups), groups - 1)
        R = np.zeros((r, r))
        for i, number in enumerate(x.reshape(groups, u)[group]):
            drawn = Draws(P.seed, Purpose.TINYLORA, module).normal(i * r * r, r * r)
            R += number * drawn.reshape(r, r) / math.sqrt(r)
        U, S, V = singular(weights(module), r)
        result.append(flat(U @ np.diag(np.sqrt(S)) @ R, np.diag(np.sqrt(S)) @ V.T))
    return np.concatenate(result)


def by_gaussian(P, layout, x, trained, weights):
    drawn = Draws(P.seed, Purpose.GAUSSIAN)
    return np.array([drawn.normal(i * P.d, P.d) @ x for i in range(P.D)]) / math.sqrt(P.D)


def by_fastfood(P, layout, x, trained, weights):
    n, result = 2 ** math.ceil(math.log2(P.d)), []
    H = np.ones((1, 1))
    while len(H) < n:
        H = np.block([[H, H], [H, -H]])
    H /= math.sqrt(n)
    padded = np.concatenate([x, np.zeros(n - P.d)])
    for k in range(-(-P.D // n)):
        B, G = (Draws(P.seed, purpose) for purpose in (Purpose.FASTFOOD_B, Purpose.FASTFOOD_G))
        g = G.normal(k * n, n) if P.given_options["gaussian"] else G.signs(k * n, n)
        Pi = np.eye(n)[Draws(P.seed, Purpose.FASTFOOD_PERMUTATION).words(k * n, n).argsort()]
        result.append(math.sqrt(n / P.D) * H @ np.diag(g) @ Pi @ H @ np.diag(B.signs(k * n, n)) @ padded)
    return np.concatenate(result)[: P.D]


def by_fourierft(P, layout, x, trained, weights):
    count, scale, result = P.given_options["n_frequency"], P.given_options["scale"], []
    for module, (own,) in enumerate(parts_by_module(P, layout, x, lambda m, n: (count,))):
        m, n = layout.shapes[module]
        i, j = np.arange(m)[:, None], np.arange(n)[None, :]
        dW = np.zeros((m, n))
        for place, c in zip(P.places(module).tolist(), own, strict=True):
            p, q = divmod(place, n)
            dW += c * np.cos(2 * math.pi * (p * i / m + q * j / n)) / (m * n)
        result.append(dW.reshape(-1) * scale)
    return np.concatenate(result)


ORACLES = {name.removeprefix("by_"): oracle for name, oracle in list(globals().items()) if name.startswith("by_")}
ORACLES.pop("name")


@pytest.mark.parametrize("case", [case for case in CASES if case.name in ORACLES], ids=str)
@each_layout
def test_it_is_what_the_definition_says(case, shapes, r):
    weights = random_weights(shapes, torch.float64)
    P, layout = made(case, shapes, r, weights=weights)
    theta_d, *trained = values(P)
    expected = ORACLES[case.name](P, layout, theta_d.numpy(), [t.numpy() for t in trained], weights)
    torch.testing.assert_close(P(theta_d, trained=trained), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)


# ---- in a model ------------------------------------------------------------------------------------------------------

each_name = pytest.mark.parametrize("case", list(by_name.values()), ids=str)


def tower(dtype=torch.float32) -> Tower:
    """A model with layers of several shapes."""
    model = Tower(12)
    model.blocks = torch.nn.ModuleList(Block(12, hidden) for hidden in (20, 24, 16))
    return model.to(dtype)


def adapted(case, model=None, **changes):
    """A model with an adapter whose numbers are random."""
    model = tower() if model is None else model
    adapter = ul.attach(model, case.config(3, random_seed(), target_modules=["up", "down"], **changes))
    with torch.no_grad():
        for tensor in adapter.trained.values():
            tensor.normal_(std=0.5)
    return model, adapter


def gradients(model, adapter, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return [tensor.grad for tensor in adapter.trained.values()]


@each_case
def test_layers_add_their_update(case):
    model, adapter = adapted(case, tower(torch.float64))
    x, P = tokens(), adapter.projection
    theta_d, *trained = (t.detach() for t in adapter.trained.values())
    theta_D, weights, start = P(theta_d, trained=trained), {}, 0
    for name, layer in adapter.layers.items():
        (m, n), r = layer.weight.shape, 3
        if P.order is Order.DENSE:
            dW, stop = theta_D[start : start + m * n].view(m, n), start + m * n
        else:
            stop = start + (m + n) * r
            first, second = (r * n, m * r) if P.order is Order.A_B else (m * r, r * n)
            parts = theta_D[start:stop].split([first, second])
            A, B = parts if P.order is Order.A_B else parts[::-1]
            dW = B.view(m, r) @ A.view(r, n)
        weights[name], start = layer.weight.detach() + dW, stop
    assert start == P.D
    y = model(x)
    plain = tower(torch.float64)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("unilora.")})
    for name, weight in weights.items():
        plain.get_submodule(name).weight.data = weight
    torch.testing.assert_close(y, plain(x))


@each_case
def test_save_and_load(case, tmp_path):
    base = tower()
    model, adapter = adapted(case, copy.deepcopy(base))
    adapter.save(tmp_path)
    again = ul.load(copy.deepcopy(base), tmp_path)
    for name, tensor in adapter.trained.items():
        assert torch.equal(again.trained[name], tensor), name
    assert again.projection.spec() == adapter.projection.spec()
    x = tokens()
    assert torch.equal(again.model(x), model(x))
    gradients(again.model, again, x)


@each_case
def test_merge_and_unmerge(case):
    model, adapter = adapted(case)
    x, before = tokens(), {name: layer.weight.clone() for name, layer in adapter.layers.items()}
    y = model(x)
    adapter.merge()
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
    adapter.unmerge()
    assert all(torch.equal(layer.weight, before[name]) for name, layer in adapter.layers.items())
    assert torch.equal(model(x), y)
    plain = adapter.detach(merge=True)
    assert type(plain.blocks[0].up) is torch.nn.Linear
    torch.testing.assert_close(plain(x), y, rtol=1e-4, atol=1e-4)


@each_case
def test_export_as_lora(case, tmp_path):
    _, adapter = adapted(case)
    if adapter.projection.order is Order.DENSE:
        with pytest.raises(ul.UniLoRAError, match="low-rank"):
            adapter.export_lora(tmp_path)
        assert not list(tmp_path.iterdir())
        return
    adapter.export_lora(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    for name, layer in adapter.layers.items():
        A, B = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        torch.testing.assert_close(B @ A, layer.delta_weight())


@each_case
def test_training_lowers_the_loss(case):
    model = tower()
    adapter = ul.attach(model, case.config(3, random_seed(), target_modules=["up", "down"]))
    rates = adapter.projection.learning_rates
    optimizer = torch.optim.AdamW(
        [{"params": [t], "lr": rates[name]} for name, t in adapter.trained.items()], weight_decay=0.0
    )
    x, target, losses = tokens(16), torch.randint(5, (16,)), []
    for _ in range(30):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), target)
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
    assert all(t.grad.isfinite().all() for t in adapter.trained.values())
    assert losses[-1] < losses[0]


@each_name
def test_copies_of_a_model(case):
    model, adapter = adapted(case)
    x = tokens()
    y = model(x)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    assert {f"unilora.{name}" for name in adapter.trained} == {name for name in state if name.startswith("unilora.")}
    buffer = io.BytesIO()
    torch.save(model, buffer)
    for other in (copy.deepcopy(model), torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)):
        assert torch.equal(other(x), y)
        with torch.no_grad():
            for tensor in ul.get_adapter(other).trained.values():
                tensor.mul_(0.5).add_(0.1)
        assert not torch.equal(other(x), y) and torch.equal(model(x), y)
        other.load_state_dict(state)
        assert torch.equal(other(x), y)


@each_name
@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
def test_activation_checkpointing(case, kind):
    model, adapter = adapted(case, tower(torch.float64))
    x = tokens()
    expected = gradients(model, adapter, x)
    model.checkpointing = kind
    for got, grad in zip(gradients(model, adapter, x), expected, strict=True):
        torch.testing.assert_close(got, grad)


@each_name
def test_compiled(case):
    torch.compiler.reset()
    model, adapter = adapted(case)
    x = tokens()
    y, expected = model(x), gradients(model, adapter, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), y)
    for got, grad in zip(gradients(compiled, adapter, x), expected, strict=True):
        torch.testing.assert_close(got, grad, rtol=1e-4, atol=1e-4)


@each_name
def test_half_types(case):
    model, adapter = adapted(case, tower(torch.bfloat16))
    assert all(t.dtype == torch.float32 for t in adapter.trained.values())
    x = tokens()
    y = model(x)
    assert y.dtype == torch.bfloat16 and y.isfinite().all()
    assert all(g.isfinite().all() for g in gradients(model, adapter, x))

    model, adapter = adapted(case)
    expected = model(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        grads = gradients(model, adapter, x)
    torch.testing.assert_close(y.float(), expected, rtol=0.1, atol=0.1 * float(expected.abs().max()))
    assert all(g.isfinite().all() and g.dtype == torch.float32 for g in grads)


@each_name
def test_one_layer_by_hand(case):
    options = {**case.options, **({"groups": 1} if "groups" in case.options else {})}
    linear = torch.nn.Linear(8, 12)
    layer = ul.UniLoRALinear.from_linear(linear, r=2, d=case.d, projection=case.name, projection_options=options)
    x = torch.randn(3, 8)
    layer(x).sum().backward()
    torch.testing.assert_close(layer(x), linear(x) + x @ layer.delta_weight().T, rtol=1e-4, atol=1e-5)


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@each_case
def test_the_gpu_has_the_same_map(case):
    """theta_D, P^T g and the gradients of the trained parts as on the CPU, and bit-equal from run to run."""
    P, layout = made(case)
    numbers = values(P, torch.float32)
    g_D = torch.randn(layout.D)

    def of(device):
        theta_d, *trained = (t.to(device).requires_grad_() for t in numbers)
        theta_D = P(theta_d, trained=trained)
        return [theta_D.detach(), *torch.autograd.grad(theta_D, (theta_d, *trained), g_D.to(device))]

    first, again = of("cuda"), of("cuda")
    assert all(map(torch.equal, first, again))
    for got, expected in zip(first, of("cpu"), strict=True):
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.cuda
@each_case
def test_a_model_on_the_gpu(case):
    model, x = tower(), tokens()
    adapter = ul.attach(model, case.config(2, target_modules=["up", "down"]))
    y = model(x)
    loss = y.square().sum()
    expected = torch.autograd.grad(loss, list(adapter.trained.values()))
    model.cuda()
    torch.testing.assert_close(model(x.cuda()).cpu(), y, rtol=1e-3, atol=1e-4)
    got = torch.autograd.grad(model(x.cuda()).square().sum(), list(adapter.trained.values()))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-2, atol=1e-3)
