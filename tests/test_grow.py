"""grow: a longer theta_d in the middle of training; the same function, more to train."""

import copy

import pytest
import torch
from models import Tower, assert_unchanged, dense_update, snapshot, tokens
from torch import nn

import unilora_ext as ul
from unilora_ext.projections import projection_class

SPLIT = [("uniform", True), ("uniform", False), ("balanced", True), ("balanced", False), ("countsketch", None)]
"""Projections whose columns split, with materialize."""
D = 594  # of the model below, at r = 3


def config(projection="uniform", **changes):
    seed = int(torch.randint(1 << 40, ()))
    ours = {"r": 3, "d": 31, "target_modules": ["up", "down"], "seed": seed, "alpha": 4.5, "init_bound": 0.5}
    return ul.UniLoRAConfig(projection=projection, **{**ours, **changes})


def adapted(projection="uniform", dtype=torch.float32, **changes):
    model = Tower().to(dtype)
    return model, ul.attach(model, config(projection, **changes))


def step(model, optimizer):
    optimizer.zero_grad()
    model(tokens()).square().sum().backward()
    optimizer.step()


def trained(optimizer_class=torch.optim.AdamW, projection="uniform", dtype=torch.float32, steps=3, **changes):
    model, adapter = adapted(projection, dtype, **changes)
    optimizer = optimizer_class([adapter.theta_d], lr=1e-2)
    for _ in range(steps):
        step(model, optimizer)
    return model, adapter, optimizer


# ---- the columns of P split -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("projection", ["uniform", "balanced", "countsketch"])
def test_columns_split(projection):
    """Every row of the larger P lies in a child of the column that it had; with the sizes drawn at random."""
    kind = projection_class(projection)
    for _ in range(30):
        d, k = (int(torch.randint(1, high, ())) for high in (90, 9))
        rows, seed = d * k + int(torch.randint(900, ())), int(torch.randint(1 << 62, ()))
        version = kind.versions[int(torch.randint(len(kind.versions), ()))]
        small, large = (kind(rows, columns, seed, version=version) for columns in (d, d * k))
        if k > 1:
            assert torch.equal(small.parents(d * k)[large.index.long()], small.index.long())


def test_columns_of_many_rows_split():
    small, large = (ul.UniformProjection((1 << 31) - (1 << 16), d, seed=3) for d in (12345, 12345 * 17000))
    rows = small.D - 5000, small.D
    assert torch.equal(small.parents(large.d)[large.columns(*rows).long()], small.columns(*rows).long())


def test_other_projections_say_that_they_do_not_split():
    for name in ("peft", "local", "nonuniform", "gaussian", "fastfood", "identity", "vera", "loraxs"):
        model = Tower()
        adapter = ul.attach(
            model, config(name, d=31 if name not in ("identity", "vera", "loraxs") else None, init_bound=None)
        )
        before, d = snapshot(model), adapter.config.d
        with pytest.raises(ul.UniLoRAError, match=f"columns split.*'uniform', 'balanced' or 'countsketch'.*'{name}'"):
            adapter.grow(2 * d)
        assert_unchanged(model, before)
        assert adapter.config.d == d


# ---- the model computes what it did ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize(("projection", "materialize"), SPLIT)
@pytest.mark.parametrize("k", [2, 19])
def test_the_function_stays_and_all_of_theta_d_is_trained(projection, materialize, dtype, tolerance, k):
    model, adapter = adapted(projection, dtype, materialize=materialize)
    x, theta_d, seed = tokens(), adapter.theta_d, adapter.config.seed
    before, updates = model(x).detach(), dense_update(model, adapter)
    adapter.grow(31 * k)
    assert adapter.theta_d is theta_d and theta_d.shape == (31 * k,) and theta_d.dtype == dtype
    assert theta_d.requires_grad and theta_d.is_leaf
    torch.testing.assert_close(model(x), before, rtol=tolerance, atol=tolerance)
    for name, update in dense_update(model, adapter).items():  # from the longer vector, by the paper's formulas
        torch.testing.assert_close(update, updates[name], rtol=tolerance, atol=tolerance)

    P = adapter.projection
    assert (P.name, P.seed, P.d, P.D, adapter.config.d) == (projection, seed, 31 * k, D, 31 * k)
    dense, used = P.dense(), P.counts > 0
    torch.testing.assert_close(dense.T @ dense, torch.diag(used.double()), rtol=1e-12, atol=1e-12)

    model(x).square().sum().backward()
    assert theta_d.grad.shape == (31 * k,) and torch.equal(theta_d.grad != 0, used)
    fresh = Tower().to(dtype)
    fresh.load_state_dict({name: t for name, t in model.state_dict().items() if name != "unilora.theta_d"})
    other = ul.attach(fresh, adapter.config)  # the oracle: an adapter that had this length from the start
    with torch.no_grad():
        other.theta_d.copy_(theta_d)
    fresh(x).square().sum().backward()
    assert torch.equal(fresh(x), model(x)) and torch.equal(other.theta_d.grad, theta_d.grad)


@pytest.mark.parametrize("projection", ["uniform", "balanced"])
def test_without_scales(projection):
    model, adapter = adapted(projection, projection_options={"normalize": False})
    x, theta_d = tokens(), adapter.theta_d.detach().clone()
    before, parents = model(x).detach(), adapter.projection.parents(31 * 4)
    adapter.grow(31 * 4)
    assert torch.equal(adapter.theta_d, theta_d[parents]) and torch.equal(model(x), before)


def test_up_to_d_of_D():
    """Many columns have no row then: their numbers are finite and do nothing."""
    model, adapter, optimizer = trained(d=297)
    x = tokens()
    before = model(x).detach()
    adapter.grow(D, optimizer)
    assert (adapter.projection.counts == 0).any() and adapter.theta_d.isfinite().all()
    torch.testing.assert_close(model(x), before, rtol=1e-6, atol=1e-6)
    step(model, optimizer)
    assert adapter.theta_d.isfinite().all()


def test_twice_is_once_by_the_product():
    models = [Tower()]
    ul.attach(models[0], config("balanced"))
    models.append(copy.deepcopy(models[0]))
    twice, once = map(ul.get_adapter, models)
    twice.grow(62)
    twice.grow(186)
    once.grow(186)
    torch.testing.assert_close(twice.theta_d, once.theta_d, rtol=1e-6, atol=1e-7)
    assert twice.config == once.config and torch.equal(twice.projection.index, once.projection.index)


def test_a_kept_evaluation_and_a_copy_do_not_outlive_it():
    """An evaluation without gradients keeps theta_D for the next one; a deep copy goes on by itself."""
    model, adapter = adapted()
    model.eval()
    x = tokens()
    with torch.no_grad():
        before = model(x)
        other = copy.deepcopy(model)
        adapter.grow(62)
        torch.testing.assert_close(model(x), before, rtol=1e-6, atol=1e-6)
        adapter.theta_d.mul_(1.5)
        assert not torch.allclose(model(x), before, rtol=1e-3)
        assert torch.equal(other(x), before)
    copied = ul.get_adapter(other)
    assert copied.theta_d.shape == (31,) and copied.config.d == 31
    copied.grow(93)
    assert adapter.config.d == 62 and adapter.projection.d == 62
    grown = ul.get_adapter(copy.deepcopy(model))
    assert torch.equal(grown.theta_d, adapter.theta_d) and grown.config.d == 62


def test_inside_inference_mode_and_while_switched_off():
    model, adapter = adapted(modules_to_save=["head"])
    plain, x = copy.deepcopy(model), tokens()
    before = model(x).detach()
    with adapter.disable(), torch.inference_mode():
        ul.get_adapter(plain).disable()
        adapter.grow(62)
        torch.testing.assert_close(model(x), plain(x))
    torch.testing.assert_close(model(x), before, rtol=1e-6, atol=1e-6)
    model(x).sum().backward()
    assert not adapter.theta_d.is_inference() and adapter.theta_d.grad.shape == (62,)
    adapter.merge()
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    adapter.detach()


def test_compiled():
    torch._dynamo.reset()
    model, adapter = adapted()
    x, compiled = tokens(), torch.compile(model, fullgraph=True, backend="aot_eager")
    before = compiled(x)
    before.sum().backward()  # and its graph is still there
    adapter.grow(62)
    torch.testing.assert_close(compiled(x), before, rtol=1e-5, atol=1e-5)
    compiled(x).square().sum().backward()
    gradient = adapter.theta_d.grad
    adapter.theta_d.grad = None
    model(x).square().sum().backward()
    torch.testing.assert_close(gradient, adapter.theta_d.grad, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("checkpointing", ["reentrant", "non-reentrant"])
def test_under_activation_checkpointing(checkpointing):
    model, adapter, optimizer = trained()
    model.checkpointing = checkpointing
    step(model, optimizer)
    adapter.grow(93, optimizer)
    step(model, optimizer)
    assert adapter.theta_d.grad.shape == (93,)


def test_the_backward_of_a_forward_from_before_is_an_error():
    model, adapter = adapted()
    loss = model(tokens()).sum()
    adapter.grow(62)
    with pytest.raises(RuntimeError, match="theta_d was replaced by one of another length"):
        loss.backward()
    assert adapter.theta_d.grad is None
    model(tokens()).sum().backward()
    assert adapter.theta_d.grad.shape == (62,)


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projection", ["uniform", "balanced", "countsketch"])
def test_saved_loaded_and_resumed(projection, tmp_path):
    """The file is that of an adapter of the new length; training goes on from it as without a stop."""
    model, adapter, optimizer = trained(projection=projection)
    plain = copy.deepcopy(model)
    ul.get_adapter(plain).detach()
    adapter.grow(124, optimizer)
    step(model, optimizer)
    adapter.save(tmp_path / "adapter")
    assert ul.read(tmp_path / "adapter").config == adapter.config
    saved = copy.deepcopy(optimizer.state_dict())

    loaded = ul.load(plain, tmp_path / "adapter")
    x = tokens()
    assert torch.equal(plain(x), model(x)) and torch.equal(loaded.theta_d, adapter.theta_d)
    resumed = torch.optim.AdamW([loaded.theta_d], lr=1e-2)
    resumed.load_state_dict(saved)
    state = torch.get_rng_state()
    step(model, optimizer)
    torch.set_rng_state(state)
    step(plain, resumed)
    assert torch.equal(loaded.theta_d, adapter.theta_d)
    loaded.grow(248, resumed)


def test_version_1_of_balanced_stays():
    """The file of an older writer is grown by its own algorithm, not by the newest."""
    from unilora_ext.attaching import Plan
    from unilora_ext.linear import start_on

    model = nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 5))
    plan = Plan.of(model, ul.UniLoRAConfig(r=2, d=6, target_modules="all-linear", projection="balanced"), version=1)
    adapter = plan.attach(start_on(plan.projection, model[0].weight, 0.5))
    x = torch.randn(4, 9)
    before = model(x)
    adapter.grow(24)
    assert adapter.projection.version == 1
    torch.testing.assert_close(model(x), before, rtol=1e-6, atol=1e-6)


# ---- the optimizer --------------------------------------------------------------------------------------------------


def factors(old, new, normalize):
    """(parents, factors of first moments, of second ones, of the first over the root of the second, of that root), from
    the indices alone."""
    parents = torch.zeros(new.d, dtype=torch.int64)
    parents[new.index.long()] = old.index.long()
    n, n_new = old.index.long().bincount(minlength=old.d).double(), new.index.long().bincount(minlength=new.d).double()
    used, share = n_new > 0, n_new / n[parents]
    first, second = (share.sqrt(), used.double()) if normalize else (share, share)
    return parents, first, second, torch.where(used, first / second.sqrt(), 0.0), second.sqrt()


def adafactor(parameters, lr):
    """Transformers'."""
    optimization = pytest.importorskip("transformers.optimization")
    return optimization.Adafactor(parameters, lr=lr, relative_step=False, scale_parameter=False, beta1=0.9)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("make", "names"),
    [
        (torch.optim.AdamW, {"exp_avg": 1, "exp_avg_sq": 2}),
        (lambda p, lr: torch.optim.Adam(p, lr=lr, amsgrad=True), {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}),
        (lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True), {"exp_avg": 1, "exp_avg_sq": 2}),
        (torch.optim.NAdam, {"exp_avg": 1, "exp_avg_sq": 2}),
        (torch.optim.RAdam, {"exp_avg": 1, "exp_avg_sq": 2}),
        (torch.optim.Adamax, {"exp_avg": 1, "exp_inf": 4}),
        (torch.optim.Adagrad, {"sum": 2}),
        (torch.optim.Adafactor, {"variance": 2}),
        (lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9), {"momentum_buffer": 1}),
        (torch.optim.SGD, {}),
        (
            lambda p, lr: torch.optim.RMSprop(p, lr=lr, momentum=0.9, centered=True),
            {"square_avg": 2, "grad_avg": 1, "momentum_buffer": 3},
        ),
        (adafactor, {"exp_avg_sq": 2, "exp_avg": 3}),
    ],
)
def test_an_optimizers_state_is_carried_over(make, names, normalize):
    model, adapter, optimizer = trained(make, projection_options={"normalize": normalize})
    before, old = copy.deepcopy(dict(optimizer.state[adapter.theta_d])), adapter.projection
    adapter.grow(93, optimizer)
    after = optimizer.state[adapter.theta_d]
    parents, *by_kind = factors(old, adapter.projection, normalize)
    assert after.keys() == before.keys() and {k for k, v in after.items() if getattr(v, "ndim", 0)} == set(names)
    for name, value in before.items():
        expected = value
        if name in names:
            expected = (value.double()[parents] * by_kind[names[name] - 1]).to(value.dtype)
        if isinstance(expected, torch.Tensor):
            torch.testing.assert_close(after[name], expected, rtol=1e-6, atol=0)
        else:
            assert after[name] == expected
    theta_d = adapter.theta_d.detach().clone()
    step(model, optimizer)
    moved = adapter.theta_d != theta_d
    assert moved[adapter.projection.counts > 0].all() and adapter.theta_d.isfinite().all()


def test_momentum_goes_on_as_if_nothing_had_been_done():
    """With no new gradient, a step of SGD with momentum moves the model as it would have: the same theta_D."""
    model, adapter, optimizer = trained(lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9), dtype=torch.float64)
    other, x = copy.deepcopy(model), tokens()
    twin = ul.get_adapter(other)
    copied = torch.optim.SGD([twin.theta_d], lr=1e-2, momentum=0.9)
    copied.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    adapter.grow(93, optimizer)
    for one, of in ((adapter, optimizer), (twin, copied)):
        one.theta_d.grad = torch.zeros_like(one.theta_d)
        of.step()
    torch.testing.assert_close(model(x), other(x), rtol=1e-12, atol=1e-12)


def test_squares_of_gradients_stay_as_large():
    """What the factor of second moments rests on: rows of random sign, so that a column's gradient is as large with a
    fourth of the rows, where P is isometric."""
    small, large = (ul.UniformProjection(40_000, d, seed=7) for d in (200, 800))
    gradients = torch.randn(200, 40_000, dtype=torch.float64)
    squares = [torch.stack([P.transpose(g) for g in gradients]).square().mean(0) for P in (small, large)]
    ratio = squares[1] / squares[0][small.parents(800)]
    assert abs(ratio.mean() - 1) < 0.05


def test_an_optimizer_that_has_made_no_step():
    model, adapter = adapted()
    optimizer = torch.optim.AdamW([{"params": [adapter.theta_d]}, {"params": model.head.parameters()}], lr=1e-2)
    adapter.grow(62)
    adapter.grow(124, optimizer)
    step(model, optimizer)
    assert optimizer.state[adapter.theta_d]["exp_avg"].shape == (124,)


def test_training_goes_on_to_where_the_shorter_vector_cannot():
    """Least squares against a full theta_D: the loss at the end is lower with more numbers."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 8))
    target, x = torch.randn(64, 8), torch.randn(64, 12)
    adapter = ul.attach(model, ul.UniLoRAConfig(r=4, d=10, target_modules="all-linear"))
    optimizer, losses = torch.optim.AdamW([adapter.theta_d], lr=2e-2, weight_decay=0.0), []
    for d in (10, 40, 160):
        if d > 10:
            adapter.grow(d, optimizer)
        for _ in range(150):
            optimizer.zero_grad()
            loss = (model(x) - target).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]


# ---- errors come before any change ----------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [31, 30, 93 + 1, 0, -31, 31 * 20, "62", 62.0, True, None])
def test_a_wrong_length(d):
    model, adapter = adapted()
    before = snapshot(model), adapter.projection, adapter.config
    with pytest.raises(ul.UniLoRAError, match=r"d: expected .*got"):
        adapter.grow(d)
    assert_unchanged(model, before[0])
    assert adapter.projection is before[1] and adapter.config is before[2]


def test_merged():
    model, adapter = adapted()
    adapter.merge()
    before = snapshot(model)
    with pytest.raises(ul.UniLoRAError, match=r"merged .* call unmerge\(\)"):
        adapter.grow(62)
    assert_unchanged(model, before)
    adapter.unmerge()
    adapter.grow(62)


def state_of(optimizer, adapter):
    return {name: copy.copy(value) for name, value in optimizer.state[adapter.theta_d].items()}


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (torch.optim.Rprop, "prev"),
        (torch.optim.Adadelta, "acc_delta"),
        (torch.optim.ASGD, "ax"),
        (torch.optim.LBFGS, "al"),
    ],
)
def test_a_state_of_another_meaning_is_named(make, name):
    model, adapter = adapted()
    optimizer = make([adapter.theta_d], lr=1e-3)
    for _ in range(2):
        optimizer.step(lambda: (optimizer.zero_grad(), model(tokens()).sum(), model(tokens()).sum().backward())[1])
    before, kept = snapshot(model), state_of(optimizer, adapter)
    with pytest.raises(ul.UniLoRAError, match=f"grow: optimizer: .*got '{name}' .*{type(optimizer).__name__}"):
        adapter.grow(62, optimizer)
    assert_unchanged(model, before)
    assert state_of(optimizer, adapter).keys() == kept.keys() and adapter.theta_d.shape == (31,)


class Packed(torch.Tensor):
    """As torchao's 8-bit states: a subclass."""


@pytest.mark.parametrize("state", [torch.zeros(31, dtype=torch.uint8), torch.zeros(31).as_subclass(Packed), [0.0]])
def test_a_state_in_another_form_is_named(state):
    _, adapter, optimizer = trained()
    optimizer.state[adapter.theta_d]["exp_avg"] = state
    with pytest.raises(ul.UniLoRAError, match=r"expected numbers, and floating tensors .*got 'exp_avg'"):
        adapter.grow(62, optimizer)
    assert optimizer.state[adapter.theta_d]["exp_avg"] is state and adapter.theta_d.shape == (31,)


def test_an_optimizer_that_is_not_given():
    """A fused step with the old state would write beyond it."""
    model, adapter, optimizer = trained()
    before = snapshot(model)
    for given, words in (
        (None, "got None: an optimizer keeps .*'exp_avg'"),
        (torch.optim.SGD([adapter.theta_d], lr=0.1), "got another one: an optimizer keeps"),
        (torch.optim.SGD(model.head.parameters(), lr=0.1), "expected one of theta_d, got a SGD without it"),
        ("AdamW", "expected a torch.optim.Optimizer, got str"),
    ):
        with pytest.raises(ul.UniLoRAError, match=words):
            adapter.grow(62, given)
        assert_unchanged(model, before)
    del optimizer
    adapter.grow(62)


def test_a_detached_adapter():
    _, adapter = adapted()
    adapter.detach()
    with pytest.raises(ul.AttachError, match="was detached"):
        adapter.grow(62)
