"""What single projections of the family have of their own."""

import copy
import math

import pytest
import torch
from models import Block, Tower, tokens
from test_family import SHAPES, by_name, each_seeded, made, random_seed, random_weights, values
from torch._subclasses.fake_tensor import FakeTensorMode

import unilora_ext as ul
from unilora_ext.projections import fastfood, gaussian
from unilora_ext.projections.svd import Basis

GOLDEN = {
    "fourierft": [1.7564929, -2.4088583, -0.84422235, 0.49510292, -16.408142, 0.67555062],
    "fastfood": [-0.3604088, 0.032882174, 0.0075259897, 0.12565341, -0.13064247, 0.1488276],
    "gaussian": [-0.13589282, -0.0046696918, 0.024029935, 0.18472343, 0.041993489, 0.072655487],
    "tinylora": [-0.18235858, -0.25093807, -0.07707272, -0.040685192, 0.68638405, 0.34431091],
    "vera": [-0.72043459, -0.38667154, 0.24806311, -0.11415466, -0.13423638, -0.018789002],
    "countsketch": [0.17469361, -0.23271657, 0.16507918, 0.032229271, 0.17085859, -0.26560695],
    "nonuniform": [-0.13871561, 0.32005676, -0.12247599, -0.20902762, -0.16987138, 0.089050807],
    "local": [0.30151134, -0.10744865, -0.17469361, -0.028001495, -0.12305679, -0.22360953],
    "peft": [-0.076316579, -0.15811582, 0.1831389, 0.1831389, 0.15597184, 0.28867513],
    "balanced": [0.11780314, -0.11541837, -0.27457452, -0.28866383, 0.28541444, 0.1498529],
    "uniform": [-0.17469361, -0.23271657, 0.16507918, 0.032229271, 0.17085859, -0.26560695],
}
"""theta_D at some positions, of theta_d[j] = cos(j), seed 12345 and rank 3: part of the file format."""


@each_seeded
def test_golden_values(name):
    def weights(module):
        m, n = SHAPES[module]
        return ((torch.arange(m * n) * 7919) % 1009).double().view(m, n) / 500 - 1

    P, layout = made(by_name[name], seed=12345, weights=weights)
    theta_D = P(torch.arange(P.d, dtype=torch.float64).cos())
    assert len(theta_D) == layout.D
    got = [float(f"{x:.8g}") for x in theta_D[[0, 7, 50, 101, -9, -1]].tolist()]
    assert got == pytest.approx(GOLDEN[name], rel=1e-6, abs=1e-12)


# ---- isometry --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [("local", {}), ("nonuniform", {}), ("countsketch", {}), ("loraxs", {"sigma": False})],
)
def test_columns_are_orthonormal(name, options):
    P, _ = made(type(by_name[name])(name, by_name[name].d, options))
    dense = P.dense()
    gram = dense.T @ dense
    used = gram.diagonal() > 0  # a column may have no row
    torch.testing.assert_close(gram[used][:, used], torch.eye(int(used.sum())).double(), rtol=0, atol=1e-5)


def test_fastfood_is_isometric_where_D_is_a_multiple_of_n():
    for D, d, options, exact in ((96, 23, {}, True), (100, 23, {}, False), (96, 23, {"gaussian": True}, False)):
        P = ul.projections.FastfoodProjection(D, d, random_seed(), **options)
        error = (P.dense().T @ P.dense() - torch.eye(d).double()).abs().max()
        assert P.isometric == exact == (float(error) < 1e-12)


@pytest.mark.parametrize("name", ["gaussian", "fastfood"])
def test_isometric_in_expectation(name):
    gram = sum(P.dense().T @ P.dense() for P in (made(by_name[name])[0] for _ in range(30))) / 30
    assert float((gram - torch.eye(len(gram)).double()).abs().max()) < 0.25


# ---- blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "module", "setting", "size"), [
    ("gaussian", gaussian, "_BLOCK", 100),
    ("fastfood", fastfood, "_TOGETHER", 32),
])  # fmt: skip
def test_the_size_of_blocks_is_no_part_of_P(name, module, setting, size, monkeypatch):
    seed = random_seed()
    one, _ = made(by_name[name], seed=seed)
    monkeypatch.setattr(module, setting, size)
    many, _ = made(by_name[name], seed=seed)
    assert len(many.bounds) > len(one.bounds) == 2
    theta_d, y = torch.randn(23, dtype=torch.float64), torch.randn(one.D, dtype=torch.float64)
    torch.testing.assert_close(one(theta_d), many(theta_d))
    torch.testing.assert_close(one.transpose(y), many.transpose(y))


def test_gaussian_that_is_not_kept():
    seed = random_seed()
    kept, anew = (made(by_name["gaussian"], seed=seed, materialize=value)[0] for value in (True, False))
    theta_d, y = torch.randn(23), torch.randn(kept.D)
    assert torch.equal(kept(theta_d), anew(theta_d)) and torch.equal(kept.transpose(y), anew.transpose(y))
    assert kept.restrict("cpu").nbytes == 4 * kept.D * kept.d and anew.restrict("cpu").nbytes == 0
    assert made(by_name["gaussian"])[0].keeps
    assert not ul.projections.GaussianProjection(2**20, 2**10).keeps


def test_small_vectors_of_fastfood_are_made_together():
    P = ul.projections.FastfoodProjection(3_000_000, 100)
    assert P.n == 128 and len(P.bounds) < 20


@pytest.mark.parametrize("name", list(by_name))
def test_fakes_and_meta_tensors(name):
    P, layout = made(by_name[name])
    real = values(P, torch.float32)
    expected = P.restrict("cpu", [layout.range_of(1)]).project(real[0], None, real[1:])
    with FakeTensorMode() as mode:
        theta_d, *trained = map(mode.from_tensor, real)
        fake = P.restrict("cpu", [layout.range_of(1)]).project(theta_d, None, trained)
    assert fake.shape == expected.shape and fake.dtype == expected.dtype
    theta_d, *trained = (t.to("meta") for t in real)
    assert P(theta_d, trained=trained).shape == (layout.D,)
    again = P.restrict("cpu", [layout.range_of(1)]).project(real[0], None, real[1:])
    assert torch.equal(again, expected)


# ---- singular vectors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["loraxs", "tinylora"])
def test_other_base_weights_are_refused(name, tmp_path):
    base, other = Tower(), Tower()
    config = ul.UniLoRAConfig(r=3, projection=name, target_modules=["up", "down"])
    ul.attach(copy.deepcopy(base), config).save(tmp_path)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ul.AdapterFileError, match="the base weights are not those"):
        ul.load(other, tmp_path)
    assert all(torch.equal(t, before[k]) for k, t in other.state_dict().items())
    changed = copy.deepcopy(base)
    with torch.no_grad():
        changed.blocks[1].down.weight.normal_()
    with pytest.raises(ul.AdapterFileError, match="singular vectors differ"):
        ul.load(changed, tmp_path)
    with torch.no_grad():
        for parameter in (nearly := copy.deepcopy(base)).parameters():
            parameter.mul_(1 + 1e-6)
    ul.load(nearly, tmp_path)
    P = ul.get_adapter(nearly).projection
    check = P.stored({})["basis_check"]
    for wrong in ({}, {"basis_check": check[:-1]}, {"basis_check": check * torch.nan}, {"other": check}):
        with pytest.raises(ul.UniLoRAError):
            P.restored(wrong)


@pytest.mark.parametrize("name", ["loraxs", "tinylora"])
def test_bases_do_not_depend_on_signs(name):
    weights, seed = random_weights(SHAPES, torch.float64), random_seed()
    first, _ = made(by_name[name], weights=weights, seed=seed)
    for basis, (m, n) in zip(first.bases, SHAPES, strict=True):
        assert basis.U.shape == (m, 3) and basis.V.shape == (n, 3) and basis.U.dtype == torch.float64
        assert (basis.U.gather(0, basis.U.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (16, 16)], ids=str)
@pytest.mark.parametrize("ratio", [1.0, 1e-2, 1e-4, 1e-8, 0.0])
def test_basis_is_that_of_the_svd(shape, ratio):
    U, S, V = (
        torch.linalg.qr(torch.randn(shape[0], 5).double())[0],
        torch.tensor([1, 0.9, 0.5, 0.2 * ratio, 0.1 * ratio]).double(),
        torch.linalg.qr(torch.randn(shape[1], 5).double())[0],
    )
    basis = Basis.of(U @ S.diag() @ V.T, 4)
    torch.testing.assert_close(basis.S, S[:4], rtol=1e-6, atol=1e-14)
    for vectors in (basis.U, basis.V):
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(4).double(), rtol=0, atol=1e-9)
    expected = (U * S)[:, :4] @ V[:, :4].T
    torch.testing.assert_close(basis.U @ basis.S.diag() @ basis.V.T, expected, rtol=0, atol=1e-12)


def test_weights_that_are_not_finite_are_refused():
    with pytest.raises(ul.UniLoRAError, match="not finite"):
        Basis.of(torch.full((4, 4), torch.nan), 2)


@pytest.mark.parametrize("name", ["loraxs", "tinylora"])
def test_weights_without_values_are_refused(name):
    with torch.device("meta"):
        model = Tower()
    with pytest.raises(ul.AttachError, match="meta device"):
        ul.attach(model, ul.UniLoRAConfig(r=3, projection=name, target_modules=["up", "down"]))


# ---- starts, sizes, errors -------------------------------------------------------------------------------------------


def test_starts():
    P, layout = made(by_name["vera"])
    theta_d, r = P.start(torch.float32)["theta_d"], layout.r
    first = 0
    for m, _ in SHAPES:
        assert (theta_d[first : first + r] == 0.1).all() and (theta_d[first + r : first + r + m] == 0).all()
        first += r + m
    start = made(by_name["tied"])[0].start(torch.float64)
    assert (start["theta_d"] == 1).all() and (start["P_B"] == 0).all() and start["P_A"].dtype == torch.float64
    assert 0.5 * math.sqrt(6 / 24) < float(start["P_A"].abs().max()) <= math.sqrt(6 / 24)
    logits = made(by_name["vblora"])[0].start(torch.float32)["logits"]
    assert logits.shape == (sum(3 * (m + n) for m, n in SHAPES) // 4, 9) and 0.08 < float(logits.std()) < 0.12
    assert 0 < float(made(by_name["loraxs"])[0].start(torch.float32)["theta_d"].std()) < 2e-5
    assert (made(by_name["tinylora"])[0].start(torch.float32)["theta_d"] == 0).all()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("local", {"d": 3}, "at least 4"),
        ("local", {"materialize": False}, "materialize"),
        ("nonuniform", {"d": 1}, "at least 2"),
        ("countsketch", {"materialize": False}, "materialize"),
        ("vera", {"d": 5}, "which the sizes give"),
        ("vblora", {"projection_options": {"vector_length": 3}}, "a divisor of 4"),
        ("vblora", {"projection_options": {"num_vectors": 2, "topk": 3}}, "at most num_vectors = 2"),
        ("loraxs", {"r": 5}, r"at most 4 .*\[4, 4\]"),
        ("tinylora", {"r": 5, "projection_options": {}}, "at most 4"),
        ("tinylora", {"projection_options": {"groups": 5}}, "at most 4, the number of modules"),
        ("tinylora", {"projection_options": {"u": 0}}, "u"),
        ("fourierft", {"projection_options": {"n_frequency": 17}}, "at most 16"),
        ("fastfood", {"projection_options": {"gaussian": 1}}, "gaussian"),
    ],
)
def test_errors(name, changes, message):
    case = by_name[name]
    settings = {"r": 3, "d": case.d, "projection_options": case.options, **changes}
    r = settings.pop("r")
    with pytest.raises(ul.UniLoRAError, match=message):
        config = ul.UniLoRAConfig(r=r, projection=name, **settings)
        layout = ul.layout.Layout(SHAPES, r, case.kind.order)
        ul.config.make_projection(config, layout, weights=random_weights(SHAPES))


@pytest.mark.parametrize(("h", "dtype"), [(256, torch.uint8), (257, torch.int16), (40_000, torch.int32)])
def test_small_form_of_vblora(h, dtype):
    P = ul.projections.VBLoraProjection(
        ul.layout.Layout(((8, 4),), 1), num_vectors=h, topk=2, vector_length=4, save_only_topk=True
    )
    start = P.start(torch.float32)
    small = P.stored({"logits": start["logits"]})
    assert small["topk_indices"].dtype == dtype and small["topk_weights"].shape == (3, 1)
    again = P.restored(small)["logits"]
    whole = P.stored({"logits": start["logits"]}, resumable=True)
    assert torch.equal(P.restored(whole)["logits"], start["logits"]) and set(whole) == {"logits"}
    torch.testing.assert_close(P(start["theta_d"], trained=[again]), P(start["theta_d"], trained=[start["logits"]]))
    wrong_type = {**small, "topk_indices": small["topk_indices"].long()}
    too_large = {**small, "topk_indices": torch.full_like(small["topk_indices"], 255 if h < 256 else -1)}
    for wrong in (
        wrong_type,
        {"topk_indices": small["topk_indices"]},
        {**small, "logits": start["logits"]},
        {"logits": start["logits"][:, 1:]},
        *[too_large] * (h > 256),
    ):
        with pytest.raises(ul.UniLoRAError, match="trained parts"):
            P.restored(wrong)
    extreme = {**small, "topk_weights": torch.ones(3, 1) * 1.0000001}  # rounding may leave less than nothing
    assert P(start["theta_d"], trained=[P.restored(extreme)["logits"]]).isfinite().all()


@pytest.mark.parametrize("shape", [(7, 5), (1, 9), (6, 1), (1, 1), (2, 2), (5, 8), (8, 5)], ids=str)
def test_fourierft_is_the_whole_transform(shape):
    m, n = shape
    layout = ul.layout.Layout((shape, shape), 1, ul.layout.Order.DENSE)
    for count in {1, (m * n + 1) // 2, m * n}:
        P = ul.projections.FourierFTProjection(layout, random_seed(), n_frequency=count, scale=3.0)
        theta_d = torch.randn(P.d, dtype=torch.float64)
        for module, own in enumerate(theta_d.split(count)):
            spectrum = torch.zeros(m * n, dtype=torch.float64)
            spectrum[P.places(module)] = own
            expected = 3 * torch.fft.ifft2(spectrum.view(m, n)).real
            torch.testing.assert_close(P(theta_d)[slice(*layout.range_of(module))].view(m, n), expected)


def test_vector_length_is_the_largest_that_fits():
    for shapes, b in ((SHAPES, 4), (((768, 768), (3072, 768)), 256), (((6, 9),), 3), (((514, 1028),), 2)):
        layout = ul.layout.Layout(shapes, 1)
        assert ul.projections.VBLoraProjection(layout).vector_length == b


def test_groups_are_pefts():
    shapes, u = ((4, 4),) * 7, 2
    P = made(type(by_name["tinylora"])("tinylora", None, {"u": u, "groups": 3}), shapes, 2)[0]
    assert [P.columns_of(module)[0] // u for module in range(7)] == [0, 0, 1, 1, 2, 2, 2]
    assert P.d == 6


def test_tower_without_common_divisor():
    model = Tower(12)
    model.blocks = torch.nn.ModuleList([Block(12, 19)])
    adapter = ul.attach(model, ul.UniLoRAConfig(r=2, projection="vblora", target_modules=["up", "down"]))
    assert adapter.projection.vector_length == 1
    assert model(tokens()).isfinite().all()


def test_dense_updates_may_have_more_values_than_an_index_has(tmp_path):
    """FourierFT of a model of billions of weights: only the coefficients have a vector."""
    model = torch.nn.Sequential(*(torch.nn.Linear(1 << 16, 1 << 16, bias=False, device="meta") for _ in range(2)))
    adapter = ul.attach(model, ul.UniLoRAConfig(r=1, projection="fourierft"))
    assert adapter.projection.D == 2 << 32 and adapter.theta_d.shape == (2000,)
    adapter.save(tmp_path)
    assert ul.read(tmp_path).record["D"] == 2 << 32
    with pytest.raises(ul.UniLoRAError, match=r"UniformProjection: D: expected an integer in \[1, 2147418112\]"):
        ul.UniformProjection(2 << 32, 5)
