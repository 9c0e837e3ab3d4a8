"""Arguments that sizes and dtypes do not tell from good ones: tensors without memory, on several devices, or written to
by another thread. What would crash runs in a process of its own."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import unilora_ext  # noqa: F401  registers the operators

ops = torch.ops.unilora


def calls():
    """operator -> its good arguments, by name."""
    x, weight, A, B = torch.randn(3, 5), torch.randn(4, 5), torch.randn(2, 5), torch.randn(4, 2)
    theta_d, scale, index, g_D = torch.randn(6), torch.rand(6), torch.arange(6, dtype=torch.int32), torch.randn(6)
    seeded = dict(algorithm="uniform", version=1, D=6, seed=0, ranges=[0, 6])
    return {
        "fill_index": dict(index=index, algorithm="balanced", version=2, D=9, d=3, seed=0, start=0),
        "project": dict(theta_d=theta_d, scale=scale, index=index, value=torch.randn(6), dtype=torch.float32),
        "project_scatter": dict(
            grad_theta_D=[g_D[:2], g_D[2:].clone()], scale=scale, index=index, value=torch.randn(6)
        ),
        "project_seeded": dict(theta_d=theta_d, scale=scale, **seeded, dtype=torch.float32),
        "project_seeded_scatter": dict(grad_theta_D=[g_D], scale=scale, **seeded),
        "hadamard": dict(x=torch.randn(3, 8)),
        "lora_linear": dict(x=x, weight=weight, bias=torch.randn(4), A=A, B=B, scaling=1.0),
        "lora_update": dict(y=torch.randn(3, 4), x=x, A=A, B=B, scaling=1.0),
        "lora_linear_backward": dict(
            grad_y=torch.randn(3, 4), x=x, h=torch.randn(3, 2), weight=weight, A=A, B=B, scaling=1.0,
            need_grad_x=True, need_grad_A=True, need_grad_B=True,
        ),
    }  # fmt: skip


def tensor_arguments():
    return [
        (operator, name)
        for operator, arguments in calls().items()
        for name, value in arguments.items()
        if isinstance(value, (torch.Tensor, list)) and name != "ranges"
    ]


def with_change(operator, name, change):
    """Arguments of an operator, one of them changed, in a list the last tensor."""
    arguments = calls()[operator]
    value = arguments[name]
    arguments[name] = [*value[:-1], change(value[-1])] if isinstance(value, list) else change(value)
    return arguments


@pytest.mark.parametrize(
    ("operator", "name"), [c for c in tensor_arguments() if c[0] not in ("fill_index", "hadamard")]
)
def test_meta_tensors_among_others_are_refused(operator, name):
    """PyTorch calls the fake kernel for such a mixture, whose results would be uninitialised memory."""
    with pytest.raises(
        RuntimeError, match=rf"unilora::{operator}: \w+: expected the device of \w+ \((cpu|meta)\), got"
    ):
        getattr(ops, operator)(**with_change(operator, name, lambda t: t.to("meta")))


def released(t):
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def shrunk(t):
    t = t.clone()
    t.untyped_storage().resize_(t.nbytes - t.element_size())
    return t


def strided(t):
    """Not contiguous, so that a copy would be made of it."""
    t = t.new_zeros(*t.shape, 2)[..., 0]
    t.untyped_storage().resize_(0)
    return t


def fake(t):
    return FakeTensorMode().from_tensor(t)


def check_tensors_without_memory():
    """Run in a process of its own, see below."""
    to_the_kernel = torch._C.DispatchKeySet(torch._C.DispatchKey.Python)  # fakes too
    for operator, name in tensor_arguments():
        for change in (released, shrunk, strided, fake):
            arguments = with_change(operator, name, change)
            try:
                with torch._C._ExcludeDispatchKeyGuard(to_the_kernel):
                    getattr(ops, operator)(**arguments)
            except RuntimeError as error:
                message = str(error)
            else:
                message = "no error"
            assert f"unilora::{operator}: {name}: expected a storage of " in message, (change.__name__, message)
    for operator, arguments in calls().items():  # and the good ones are taken
        getattr(ops, operator)(**arguments)
    print("all refused")


def check_an_index_that_changes():
    """Run in a process of its own, see below."""
    import threading

    d, done = 1000, threading.Event()
    index = torch.zeros(400_000, dtype=torch.int32)
    theta_d, scale, g_D = torch.randn(d), torch.rand(d), torch.randn(len(index))

    def write():
        while not done.is_set():
            for value in (2**31 - 1, 0, -(2**31), d - 1):
                index.fill_(value)

    writer = threading.Thread(target=write)
    writer.start()
    refused = 0
    try:
        for _ in range(300):
            for call in (
                lambda: ops.project(theta_d, scale, index, None, torch.float32),
                lambda: ops.project_scatter([g_D], scale, index, None),
            ):
                try:
                    assert call().isfinite().all()
                except RuntimeError as error:
                    assert "index: expected values in [0, 1000)" in str(error)
                    refused += 1
    finally:
        done.set()
        writer.join()
    print("refused", refused)


@pytest.mark.parametrize(
    ("check", "printed"),
    [("check_tensors_without_memory", "all refused"), ("check_an_index_that_changes", "refused")],
)
def test_hostile_memory_is_refused_and_never_a_crash(check, printed, tmp_path):
    script = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import {__name__}
        {__name__}.{check}()
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.returncode, done.stdout[-2000:], done.stderr[-4000:])
    assert printed in done.stdout
