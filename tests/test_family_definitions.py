"""Every projection of the family against its definition, written in NumPy."""

import math

import numpy as np
import pytest
import torch
from test_family import CASES, each_layout, made, random_weights, values

import unilora_ext as ul
from unilora_ext.projections.draws import Draws, Purpose


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


def by_identity(P, layout, x, trained, weights):
    return x


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
"""Those of uniform and balanced are in reference.py (test_index.py, test_projection.py); that of peft is PEFT."""


@pytest.mark.parametrize("case", [case for case in CASES if case.name in ORACLES], ids=str)
@each_layout
def test_it_is_what_the_definition_says(case, shapes, r):
    weights = random_weights(shapes, torch.float64)
    P, layout = made(case, shapes, r, weights=weights)
    theta_d, *trained = values(P)
    expected = ORACLES[case.name](P, layout, theta_d.numpy(), [t.numpy() for t in trained], weights)
    torch.testing.assert_close(P(theta_d, trained=trained), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)
