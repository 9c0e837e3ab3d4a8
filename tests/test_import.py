"""What ``import unilora_ext`` and the parser of the command line import, and what they leave for later."""

import ast
import subprocess
import sys
import tempfile
import types
from dataclasses import fields
from pathlib import Path

import pytest

import unilora_ext as ul
from unilora_ext.family import FAMILY

HEAVY = ("torch", "numpy", "transformers", "safetensors", "unilora_ext._C")
COMMANDS = ["finetune", "recipes", "evaluate", "predict", "generate", "inspect", "merge", "export", "properties"]
COMMANDS += ["info", "bench", "demo"]


def python(program):
    """What a program prints in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:  # not the sources: the package that is installed
        result = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def imported_by(words):
    """(exit status, heavy modules) after a command line."""
    out = python(
        "import sys\nfrom unilora_ext.cli import main\n"
        f"try:\n    status = main({words!r})\nexcept SystemExit as error:\n    status = error.code\n"
        f"print('\\n', repr((status, [name for name in {HEAVY} if name in sys.modules])))"
    )
    return ast.literal_eval(out.splitlines()[-1].strip())


@pytest.mark.parametrize("words", [[], ["--help"], *([command, "--help"] for command in COMMANDS)], ids=" ".join)
def test_help_imports_nothing_heavy(words):
    assert imported_by(words) == (0, [])


@pytest.mark.parametrize(
    "words",
    ["frobnicate", "finetune --epochs two", "finetune --nonsense", "evaluate", "predict --adapter a --device tpu"],
)
def test_errors_of_the_parser_import_nothing_heavy(words):
    assert imported_by(words.split()) == (2, [])


def test_every_command_is_measured():
    from unilora_ext.cli.parser import make_parser

    (commands,) = (action.choices for action in make_parser()._actions if action.choices)
    assert list(commands) == COMMANDS


def test_the_parser_knows_every_projection():
    """It lists them without importing them."""
    from unilora_ext.cli.settings import Settings

    (option,) = (spec.metadata for spec in fields(Settings) if spec.name == "projection")
    assert option["expected"] == "one of " + ", ".join(FAMILY)
    assert all(option["good"](name) and name in option["help"] for name in FAMILY)


# ---- names ----------------------------------------------------------------------------------------------------------


def test_the_lists_of_names_agree():
    """`__all__`, the table by which names are imported, and the imports that static analysis reads."""
    tree = ast.parse(Path(ul.__file__).read_text(encoding="utf-8"))
    conditional = {ast.unparse(node.test): node.body for node in tree.body if isinstance(node, ast.If)}
    declared = {alias.name: node.module for node in conditional["TYPE_CHECKING"] for alias in node.names}
    modules = {name for name, module in declared.items() if module == "unilora_ext"}
    table = {name: f"unilora_ext.{module}" for name, module in ul._MODULE_OF.items()}
    family = dict.fromkeys(FAMILY.values(), "unilora_ext.projections")  # by their own table
    assert {name: module for name, module in declared.items() if name not in modules} | family == table
    assert len(ul.__all__) == len(set(ul.__all__)) and set(ul.__all__) == {*table, *modules} - {"_C"}
    assert set(ul.__all__) <= set(dir(ul))


def test_every_name_is_that_of_its_module():
    for name in ul.__all__:
        value = getattr(ul, name)
        if isinstance(value, types.ModuleType):
            assert value.__name__ == f"unilora_ext.{name}"
        elif name != "__version__":
            assert value.__module__.startswith("unilora_ext.") and value.__name__ == name
    assert ul.__version__ == ul._C.version


@pytest.mark.parametrize("name", ["attach", "functional", "nvtx", "reference", "integrations", "_C", "__version__"])
def test_a_name_is_there_on_first_use(name):
    for program in (f"import unilora_ext as ul; print(ul.{name})", f"from unilora_ext import {name}; print({name})"):
        assert python(program).strip()


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'unilora_ext' has no attribute 'atach'"):
        ul.atach  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'atach'"):
        from unilora_ext import atach  # noqa: F401


@pytest.mark.parametrize(
    "imports",
    [
        "import torch, unilora_ext",
        "import unilora_ext, torch; unilora_ext.functional",
        "import unilora_ext.functional, torch",
    ],
)
def test_operators_are_registered(imports):
    """With their derivatives and fake kernels."""
    out = python(
        f"{imports}\nx = torch.ones(2, 3, requires_grad=True)\n"
        "W, A, B = torch.ones(4, 3), torch.ones(1, 3), torch.ones(4, 1)\n"
        "torch.ops.unilora.lora_linear(x, W, None, A, B, 1.0)[0].sum().backward(); print(x.grad.tolist())\n"
        "x, W, A, B = (t.to('meta') for t in (x, W, A, B))\n"
        "print(list(torch.ops.unilora.lora_linear(x, W, None, A, B, 1.0)[0].shape))"
    )
    assert out.splitlines() == [str([[8.0, 8.0, 8.0]] * 2), "[2, 4]"]
