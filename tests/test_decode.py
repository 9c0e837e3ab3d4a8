"""Evaluation token by token: theta_D is projected again only where theta_d has changed."""

import copy
import sys
import threading

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import unilora_ext as ul


class Projections(TorchDispatchMode):
    """Counts the projections of what runs inside."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += str(function.name()).startswith("unilora::project")
        return function(*args, **(kwargs or {}))


def projections(call):
    with Projections() as mode:
        call()
    return mode.count


@pytest.fixture
def model(device):
    model = nn.Sequential(nn.Linear(9, 16), nn.GELU(), nn.Linear(16, 9)).to(device).eval()
    ul.attach(model, ul.UniLoRAConfig(r=3, d=20, init_bound=0.5))
    return model


@pytest.fixture
def x(device):
    return torch.randn(1, 9, device=device)


def fresh(model, x):
    """y from weights that are computed here."""
    plain = copy.deepcopy(model).double()
    ul.get_adapter(plain).detach(merge=True)
    return plain(x.double())


def assert_fresh(model, x):
    torch.testing.assert_close(model(x).double(), fresh(model, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_one_projection_for_all_tokens(model, x, mode):
    with mode():
        assert projections(lambda: [model(x) for _ in range(5)]) == 1
        assert projections(lambda: model(x)) == 0
    with torch.no_grad():
        assert_fresh(model, x)


@pytest.mark.parametrize("write", ["in place", "data", "data_ptr", "replaced data", "state_dict", "numpy"])
def test_any_write_to_theta_d_is_seen(model, x, write):
    theta_d = ul.get_adapter(model).theta_d
    with torch.no_grad():
        model(x)
        before = theta_d._version
        if write == "in place":
            theta_d[3] += 1
        elif write == "data":
            theta_d.data[3] += 1
        elif write == "data_ptr":
            alias = torch.empty(0, device=theta_d.device).set_(theta_d.untyped_storage(), 0, (20,))
            alias[3] += 1
        elif write == "replaced data":
            theta_d.data = theta_d.data + torch.eye(20, device=theta_d.device)[3]
        elif write == "state_dict":
            state = {key: value.clone() for key, value in model.state_dict().items()}
            state["0.unilora.theta_d"][3] += 1
            model.load_state_dict(state)
        elif theta_d.is_cuda:
            pytest.skip("NumPy shares memory on the CPU alone")
        else:
            theta_d.detach().numpy()[3] += 1
            assert theta_d._version == before
        assert projections(lambda: model(x)) == 1
        assert_fresh(model, x)
        assert projections(lambda: model(x)) == 0


def test_an_optimizer_between_tokens_is_seen(model, x):
    adapter = ul.get_adapter(model)
    optimizer = torch.optim.SGD([adapter.theta_d], lr=0.1)
    for _ in range(3):
        with torch.no_grad():
            model(x)
            assert_fresh(model, x)
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_nothing_is_kept_in_training_or_with_gradients(model, x):
    assert projections(lambda: [model(x) for _ in range(3)]) == 3
    model.train()
    with torch.no_grad():
        assert projections(lambda: [model(x) for _ in range(3)]) == 3
    vector = ul.get_adapter(model).vector
    assert vector._kept is None
    model.eval()
    with torch.no_grad():
        model(x)
    assert vector._kept is not None
    model(x)
    assert vector._kept is None  # its memory is free for the training


def test_evaluation_in_inference_mode_then_training(model, x):
    with torch.inference_mode():
        model(x)
    with torch.no_grad():
        model(x)
    model.train()(x).sum().backward()
    assert ul.get_adapter(model).theta_d.grad.abs().sum() > 0


def test_gradients_inside_an_evaluation_are_not_kept(model, x):
    """A part that switches gradients on in a forward without them, such as a probe of the input's gradient."""
    body = model[2].forward
    calls = []

    def probing(t):
        with torch.enable_grad():
            calls.append(body(t.detach().requires_grad_()).requires_grad)
        return body(t)

    model[2].forward = probing
    with torch.no_grad():
        y = model(x)
        assert torch.equal(model(x), y) and calls == [True, True]
    kept = ul.get_adapter(model).vector._kept.made
    assert [made[2] for made in kept] == [False] and not kept.popitem()[1][0].A.requires_grad


def test_copies_moves_and_switches(model, x):
    with torch.no_grad():
        y = model(x)
        copied = copy.deepcopy(model)
        assert ul.get_adapter(copied).vector._kept is None
        ul.get_adapter(copied).theta_d.zero_()
        assert not torch.equal(copied(x), y) and torch.equal(model(x), y)
        adapter = ul.get_adapter(model)
        with adapter.disable():
            off = model(x)
        assert torch.equal(copied(x), off) and torch.equal(model(x), y)
        with torch.autocast(x.device.type, torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
        assert torch.equal(model(x), y)
        model.double()
        torch.testing.assert_close(model(x.double()), fresh(model, x))


def test_a_hook_that_writes_theta_d_is_seen_in_its_own_forward(model, x):
    """As one that gives each request a theta_d of its own."""
    theta_d = ul.get_adapter(model).theta_d
    first, second = theta_d.detach().clone(), torch.randn_like(theta_d)

    def write(*_):
        theta_d.data.copy_(second)

    with torch.no_grad():
        for warm in (False, True):
            theta_d.data.copy_(first)
            if warm:
                model(x)
            handle = model.register_forward_pre_hook(write)
            y = model(x)
            handle.remove()
            torch.testing.assert_close(y.double(), fresh(model, x), rtol=1e-4, atol=1e-5)
            theta_d.data.copy_(first)  # what was made of the second is not taken for that of the first
            assert_fresh(model, x)


def test_a_write_between_two_layers_is_not_kept_under_the_old_values(model, x):
    theta_d = ul.get_adapter(model).theta_d
    first = theta_d.detach().clone()

    def write(*_):
        theta_d.data.add_(1)

    with torch.no_grad():
        handle = model[0].register_forward_hook(write)
        model(x)
        handle.remove()
        assert_fresh(model, x)
        theta_d.data.copy_(first)
        assert_fresh(model, x)


def test_a_merged_model_keeps_no_projection(model, x):
    adapter = ul.get_adapter(model)
    with torch.no_grad():
        model(x)
        adapter.merge()
        model(x)
    assert adapter.vector._kept is None


def test_what_is_kept_is_no_inference_tensor(model, x):
    with torch.inference_mode():
        model(x)
    (made,) = ul.get_adapter(model).vector._kept.made.values()
    assert not any(
        factor.is_inference() or factor.requires_grad for update in made.values() for factor in (update.A, update.B)
    )


def test_a_tangent_of_theta_d_is_not_dropped(model, x):
    """Forward mode is an error with the adapter, not a derivative of zero, after an evaluation too."""
    theta_d = ul.get_adapter(model).theta_d
    with torch.no_grad(), forward_ad.dual_level():
        model(x)
        dual = forward_ad.make_dual(theta_d.detach(), torch.ones_like(theta_d))
        with pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward"):
            torch.func.functional_call(model, {"0.unilora.theta_d": dual}, x)


def test_threads_with_and_without_gradients(model):
    """Switching threads at every step: none sees the forward of another end."""
    inputs = [torch.randn(2, 9, device=model[0].weight.device) for _ in range(6)]
    expected = [model(x).detach() for x in inputs]
    failures = []

    def run(k):
        try:
            for _ in range(150):
                with torch.set_grad_enabled(k % 2 == 0):
                    if not torch.equal(model(inputs[k]).detach(), expected[k]):
                        failures.append("another result")
        except Exception as error:
            failures.append(repr(error))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=run, args=(k,)) for k in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures


def test_generation_gives_the_tokens_of_the_merged_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, intermediate_size=48, **shape)).double().eval()
    adapter = ul.attach(model, ul.UniLoRAConfig(r=3, d=64, target_modules="all-linear", init_bound=0.5))
    prompt, generated = torch.randint(3, 50, (2, 5)), []

    def generate():
        tokens = model.generate(prompt, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)
        generated.append(tokens)

    assert projections(generate) == 1
    adapter.merge()
    generate()
    assert torch.equal(*generated)
