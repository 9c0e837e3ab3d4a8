"""Adapters of earlier releases: what version 0.1.0 wrote (format version 1) is read for ever."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from models import Tower

import unilora_ext as ul

SAVED = Path(__file__).parent / "data" / "version_0_1_0"  # by that release, with the weights below


def known_weights(model):
    with torch.no_grad():
        for k, (_, parameter) in enumerate(sorted(model.named_parameters())):
            values = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * 0.7 + k)
            parameter.copy_(values.view(parameter.shape))
    return model


@pytest.mark.parametrize("name", ["uniform", "balanced", "peft"])
def test_an_adapter_of_version_0_1_0(name):
    expected = safetensors.torch.load_file(SAVED / f"{name}.safetensors")
    y, model = expected.pop("y"), known_weights(Tower()).eval()
    adapter = ul.load(model, SAVED / name)
    config = adapter.config
    assert (config.projection, config.seed, config.alpha, config.init_bound) == (name, 77, 3.0, 0.02)
    assert {layer: list(adapter.layers[layer].delta_weight().shape) for layer in expected} == {
        layer: list(delta.shape) for layer, delta in expected.items()
    }
    for layer, delta in expected.items():
        torch.testing.assert_close(adapter.layers[layer].delta_weight(), delta, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(model(torch.arange(14).view(2, 7)), y, rtol=1e-5, atol=1e-6)
    assert ul.read(SAVED / name).metadata == {"note": "ünïcode", "epochs": 3}


def test_it_is_saved_again_in_the_newest_format(tmp_path):
    adapter = ul.load(known_weights(Tower()), SAVED / "uniform")
    adapter.save(tmp_path / "again")
    old, new = ul.read(SAVED / "uniform"), ul.read(tmp_path / "again")
    assert (old.record["format_version"], new.record["format_version"]) == (1, 2)
    assert new.record["projection"] == {"name": "uniform", "version": 1, "seed": 77, "options": {"normalize": True}}
    assert new.config == old.config and torch.equal(new.theta_d, old.theta_d)


@pytest.mark.parametrize(("part", "field"), [("projection", "options"), ("config", "projection_options")])
def test_version_1_has_no_options(tmp_path, part, field):
    shutil.copytree(SAVED / "uniform", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter.json"
    record = json.loads(path.read_text())
    record[part][field] = {}
    del record["checksum"]
    record["checksum"] = ul.record.digest(record)
    path.write_text(json.dumps(record))
    with pytest.raises(ul.AdapterFileError, match=f"{part}: object contains unknown field '{field}'"):
        ul.read(tmp_path / "adapter")
