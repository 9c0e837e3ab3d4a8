"""The model of times on a GPU: the file is what the script makes, and a launch takes what its slowest part takes."""

import json

import model_cuda
import pytest
from model_cuda import Launch


def test_the_results_are_those_of_the_script():
    document = json.loads(model_cuda.RESULT.read_text())
    assert document["rows"] == json.loads(json.dumps(model_cuda.rows()))
    assert document["assumptions"] == [{"name": name, **vars(x)} for name, x in model_cuda.H100.items()]
    assert "measured" in document["machine"]["device"]


def test_the_slowest_part_binds():
    launch = Launch("k", hbm=3e6, blocks=132 * 2 + 1, resident=2, waits=1755)
    assert launch.limits()["HBM"] == pytest.approx(1) and launch.limits()["latency"] == pytest.approx(2)  # two waves
    assert launch.bound == "latency" and launch.us() == pytest.approx(4)
    assert Launch("k", fixed=5).us() == 5


def test_bytes_of_the_contract():
    """x once, and the small operands; y read and written, or written; g once."""
    tokens, columns, r = 4096, 4096, 16
    large, small = 2 * tokens * columns, 4 * tokens * r + 2 * r * columns
    assert model_cuda.dot(tokens, columns, r).hbm == large + small
    assert model_cuda.update(tokens, columns, r, reads=True).hbm == 2 * large + small
    assert model_cuda.update(tokens, columns, r, reads=False).hbm == large + small
    assert sum(x.hbm for x in model_cuda.outer(tokens, columns, r)) == large + small


def test_an_emulators_counts_are_compared(tmp_path):
    tokens, columns, r = 256, 1024, 16
    counted = 2 * tokens * columns + 4 * tokens * r + 2 * r * columns
    record = {"kernel": "dot_kernel<Dot>(__nv_bfloat16 const*, long, float*) #1", "lines": [{"line": "k.cuh:1"}]}
    record |= {"unique_bytes_read": counted - 4, "unique_bytes_written": 4}
    (tmp_path / "p.json").write_text(json.dumps({"kernels": [record]}))
    sizes = type("Sizes", (), {"tokens": tokens, "columns": columns, "r": r, "D": 8, "d": 2})
    (line,) = model_cuda.compare(tmp_path / "p.json", sizes)
    assert "+0.0%" in line and "dot_kernel bfloat16 float" in line
