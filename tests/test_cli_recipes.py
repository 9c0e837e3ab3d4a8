"""`unilora finetune --recipe NAME`: each recipe on a tiny model of its architecture and data of its format."""

import json
import math

import pytest
import torch

import unilora_ext as ul
from unilora_ext.cli import main
from unilora_ext.cli.errors import CliError
from unilora_ext.cli.recipe import find, recipes
from unilora_ext.cli.settings import Settings

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

from recipe_inputs import glue_split, image_split, write_decoder, write_roberta, write_vit  # noqa: E402 (needs transformers)

# The published tables, written down a second time.
GLUE = {  # columns; (head's rate, epochs) of base and large
    "mrpc": (["sentence1", "sentence2"], (2e-2, 60), (2e-3, 40)),
    "cola": (["sentence"], (5e-3, 80), (2e-2, 40)),
    "rte": (["sentence1", "sentence2"], (5e-4, 160), (5e-3, 40)),
    "stsb": (["sentence1", "sentence2"], (2e-4, 80), (2e-4, 40)),
    "sst2": (["sentence"], (1e-4, 60), (2e-4, 20)),
    "qnli": (["question", "sentence"], (2e-4, 25), (5e-3, 20)),
}
GLUE_COMMON = {"target_modules": ["query", "value"], "r": 4, "d": 23040, "batch_size": 32, "schedule": "linear"}
GLUE_COMMON |= {"warmup": 0.06, "weight_decay": 0.0, "weight_decay_head": 0.1, "dropout": 0.0}
CAUSAL_COMMON = {"task": "causal-lm", "target_modules": ["all-linear"], "r": 4, "weight_decay": 0.0}
MATH = {"lr_theta": 2e-3, "schedule": "cosine", "warmup": 0.02, "epochs": 2, "batch_size": 64, "dropout": 0.0}
MATH |= CAUSAL_COMMON | {"d": 524288, "max_length": 512, "quantization": "none"}
ALPACA = {"lr_theta": 8e-4, "schedule": "linear", "warmup": 0.1, "epochs": 1, "batch_size": 16, "dropout": 0.05}
ALPACA |= CAUSAL_COMMON | {"max_grad_norm": 0.3, "quantization": "nf4"}
CAUSAL = {
    "math-mistral-7b": ("Mistral", MATH | {"model": "mistralai/Mistral-7B-v0.1"}),
    "math-gemma-7b": ("Gemma", MATH | {"model": "google/gemma-7b"}),
    "alpaca-llama2-7b": ("Llama", ALPACA | {"model": "meta-llama/Llama-2-7b-hf", "d": 524288}),
    "alpaca-llama2-13b": ("Llama", ALPACA | {"model": "meta-llama/Llama-2-13b-hf", "d": 1048576}),
}

VIT_COMMON = {"task": "image-classification", "model": "google/vit-base-patch16-224-in21k", "r": 4, "d": 72000}
VIT_COMMON |= {"target_modules": None, "epochs": 20, "batch_size": 512, "gradient_accumulation": 4}
VIT_COMMON |= {"weight_decay": 0.01, "best": "accuracy"}
VIT = {name: (1e-2, 5e-2) for name in ("cifar10", "cars", "eurosat", "dtd", "resisc45", "fgvc")}  # theta's, head's rate
VIT |= {"cifar100": (1e-2, 1e-2), "pets": (5e-3, 5e-3)}


def published(name):
    """What the recipe's settings must be."""
    if name.startswith("vit-"):
        return VIT_COMMON | dict(zip(("lr_theta", "lr_head"), VIT[name.removeprefix("vit-")], strict=True))
    if name in CAUSAL:
        return CAUSAL[name][1]
    _, task, size = name.split("-")
    columns, *sizes = GLUE[task]
    lr_head, epochs = sizes[size == "large"]
    lr_theta = 1e-3 if name == "glue-sst2-large" else 5e-3
    model, length = f"FacebookAI/roberta-{size}", 128 if size == "large" else 512
    pair = columns[1] if len(columns) == 2 else None
    figure = {"cola": "matthews", "stsb": "pearson"}.get(task, "accuracy")
    kind = "sequence-regression" if task == "stsb" else "sequence-classification"
    return GLUE_COMMON | {
        "model": model, "task": kind, "lr_head": lr_head, "lr_theta": lr_theta, "epochs": epochs, "max_length": length,
        "text_column": columns[0], "text_pair_column": pair, "label_column": "label", "best": figure,
    }  # fmt: skip


def resolved(settings):
    return json.loads(json.dumps(vars(Settings(data="rows", **settings))))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("recipes")


@pytest.fixture(scope="module")
def roberta(folder):
    return write_roberta(folder / "roberta")


def write_glue(folder, task):
    """As the hub's repository lies in a clone: a folder of Parquet files for each task."""
    columns = GLUE[task][0]
    target = folder / "glue" / task
    target.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 40), ("validation", 12), ("test", 4)):
        rows = datasets.Dataset.from_dict(glue_split(columns, count, task == "stsb"))
        if task != "stsb":
            rows = rows.cast_column("label", datasets.ClassLabel(names=["no", "yes"]))
        rows.to_parquet(target / f"{split}-00000-of-00001.parquet")
    return folder / "glue"


def check_run(name, output, changed):
    """The run is whole, and was made with the published settings but for those changed."""
    run = json.loads((output / "run.json").read_text())["settings"]
    metrics = json.loads((output / "report/metrics.json").read_text())
    expected = {key: value for key, value in published(name).items() if key not in changed}
    assert {key: run[key] for key in expected} == expected and run["recipe"] == name
    assert metrics["results"]["settings"]["recipe"] == name
    assert math.isfinite(metrics["results"]["validation"]["loss"])
    assert (output / "report/report.png").read_bytes().startswith(b"\x89PNG")
    return metrics["results"]


@pytest.mark.parametrize("name", list(recipes()))
def test_settings_are_the_published_ones(name):
    recipe, expected = find(name), published(name)
    settings = resolved(recipe.settings)
    assert {key: settings[key] for key in expected} == expected
    assert recipe.sources and (recipe.expected is None or 0 < recipe.expected["value"] < 1)


def test_every_published_experiment_has_a_recipe():
    assert set(recipes()) == {f"glue-{task}-{size}" for task in GLUE for size in ("base", "large")} | {
        *CAUSAL,
        *(f"vit-{name}" for name in VIT),
    }


@pytest.mark.parametrize("name", [name for name in recipes() if name.startswith("glue")])
def test_glue(folder, roberta, name, capsys):
    _, task, size = name.split("-")
    data, output = write_glue(folder, task), folder / name
    command = f"finetune --recipe {name} --model {roberta} --data {data} --output {output} --d 64 --epochs 2"
    assert main([*command.split(), "--device", "cpu"]) == 0
    results = check_run(name, output, {"model", "d", "epochs"})
    assert results["rows"] == {"training": 40, "validation": 12, "test": 0}
    figure = published(name)["best"]
    best = max(results["epochs"], key=lambda epoch: epoch[f"validation_{figure}"])
    assert results["validation"][figure] == pytest.approx(best[f"validation_{figure}"], abs=1e-12)
    if size == "base":  # a new process's numbers, from the file that the run left
        capsys.readouterr()
        command = f"evaluate --adapter {output}/adapter --data {output}-data/validation.jsonl --json {output}.json"
        assert main(command.split()) == 0
        score = json.loads((folder / f"{name}.json").read_text())
        assert {key: score[key] for key in results["validation"]} == results["validation"]


@pytest.mark.parametrize("name", list(CAUSAL))
def test_causal(folder, name, capsys):
    output = folder / name
    if CAUSAL[name][1]["quantization"] == "nf4":
        pytest.importorskip("bitsandbytes")
    model = write_decoder(folder / f"{name}-base", CAUSAL[name][0])
    if name.startswith("math"):
        rows = {"query": [f"What is {i} + 1?" for i in range(80)], "response": [f"It is {i + 1}." for i in range(80)]}
        prompt = "### Instruction:\nWhat is {} + 1?\n\n### Response:"
    else:
        rows = {"instruction": [f"Name number {i}." for i in range(40)], "output": ["one", "two"] * 20}
        rows["input"] = ["" if i % 2 else "a list" for i in range(40)]
        prompt = "### Instruction:\nName number {}.\n\n### Response: "
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows)}).save_to_disk(folder / f"{name}-rows")
    command = f"finetune --recipe {name} --model {model} --data {folder}/{name}-rows --output {output} --d 64"
    assert main([*command.split(), "--epochs", "1", "--device", "cpu", "--gradient-accumulation", "4"]) == 0
    results = check_run(name, output, {"model", "d", "epochs", "gradient_accumulation"})
    assert results["sizes"]["d"] == 64
    written = [json.loads(line) for line in (folder / f"{name}-data/data.jsonl").read_text().splitlines()]
    assert written[1]["prompt"].endswith(prompt.format(1)) and "### Input" not in written[1]["prompt"]
    assert ("### Input:\na list\n" in written[0]["prompt"]) == ("input" in rows)
    assert written[1]["completion"] == rows["response" if "response" in rows else "output"][1]
    capsys.readouterr()
    assert main(f"evaluate --adapter {output}/adapter --data {output}/validation.jsonl".split()) == 0
    evaluated = capsys.readouterr()
    assert "warning" not in evaluated.err
    if CAUSAL[name][1]["quantization"] == "none":
        assert repr(results["validation"]["loss"]) in evaluated.out


@pytest.mark.parametrize("name", [name for name in recipes() if name.startswith("vit")])
def test_vit(folder, name, capsys):
    pytest.importorskip("PIL")
    settings, output = find(name).settings, folder / name
    columns = settings["text_column"], settings["label_column"]
    rows = {split: image_split(datasets, columns, count) for split, count in (("train", 60), ("test", 15))}
    datasets.DatasetDict(rows).save_to_disk(folder / f"{name}-rows")
    model = write_vit(folder / "vit")
    command = f"finetune --recipe {name} --model {model} --data {folder}/{name}-rows --output {output} --d 64"
    assert main([*command.split(), "--epochs", "2", "--batch-size", "8", "--device", "cpu"]) == 0
    results = check_run(name, output, {"model", "d", "epochs", "batch_size"})
    assert results["rows"] == {"training": 60, "validation": 15, "test": 0} and results["labels"] == ["0", "1", "2"]
    adapted = {module.rpartition(".")[2] for module, *_ in ul.read(output / "adapter").modules}
    assert adapted in ({"query", "value"}, {"q_proj", "v_proj"})
    capsys.readouterr()
    assert main(f"evaluate --adapter {output}/adapter --data {output}/validation.csv".split()) == 0
    assert repr(results["validation"]["loss"]) in capsys.readouterr().out


def test_images_are_told_apart(folder, capsys):
    """Its answers are those of Transformers' own forward pass of the merged model."""
    Image = pytest.importorskip("PIL.Image")
    rows = {split: image_split(datasets, ("img", "label"), count) for split, count in (("train", 90), ("test", 30))}
    datasets.DatasetDict(rows).save_to_disk(folder / "images")
    model, output = write_vit(folder / "vit"), folder / "bright"
    command = f"finetune --recipe vit-cifar10 --model {model} --data {folder}/images --output {output} --d 64 "
    command += "--epochs 12 --batch-size 8 --lr-theta 0.02 --lr-head 0.01 --device cpu"
    assert main(command.split()) == 0
    assert json.loads((output / "report/metrics.json").read_text())["results"]["validation"]["accuracy"] > 0.8
    assert main(["merge", f"{output}/adapter", "--output", f"{folder}/merged"]) == 0
    merged = transformers.AutoModelForImageClassification.from_pretrained(folder / "merged").eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder / "merged")
    files = sorted((folder / "bright-data/validation").iterdir())
    with torch.no_grad():
        said = [merged(**processor(Image.open(file), return_tensors="pt")).logits.argmax().item() for file in files]
    capsys.readouterr()
    command = ["predict", "--adapter", f"{output}/adapter"]
    assert main([*command, *(word for file in files for word in ("--text", str(file)))]) == 0
    assert [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()] == list(map(str, said))
    assert main([*command, "--text", str(folder / "none.png")]) == 2
    assert "expected an image file, got" in capsys.readouterr().err


def test_an_nf4_base_is_in_four_bits(folder):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from unilora_ext.cli.decoder import load_base

    model, *_ = load_base(str(write_decoder(folder / "four-bits", "Llama")), None, "bfloat16", "nf4")
    layers = [layer for layer in model.modules() if isinstance(layer, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 7 and all(layer.weight.dtype == torch.uint8 for layer in layers)
    assert all(layer.weight.quant_state.quant_type == "nf4" and layer.weight.quant_state.nested for layer in layers)


def test_recipes_are_listed(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1 : 1 + len(recipes())]] == list(recipes())
    assert main(["recipes", "glue-cola-large"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["settings"]["lr_head"] == 2e-2 and shown["expected"]["value"] == 0.685 and shown["sources"]


def test_what_is_missing_is_told(folder, roberta, capsys, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    command = ["finetune", "--recipe", "glue-rte-base", "--output", str(folder / "none")]
    for more, message in (
        ([], "expected the data set nyu-mll/glue (rte) from the hub, got"),
        (["--data", str(folder / "no")], "expected a file of rows, or a folder with a copy of nyu-mll/glue"),
        (["--data", str(roberta)], "expected a copy of the data set nyu-mll/glue (rte), got"),
        (["--data", str(write_glue(folder, "rte")), "--text-column", "premise"], "expected a column 'premise', got"),
        (["--data", str(write_glue(folder, "rte"))], "hub cannot be reached, give a copy of it: --model FOLDER"),
    ):
        assert main([*command, *more]) == 2
        error = capsys.readouterr().err
        assert message in error and ("hub" not in message or "--model FOLDER" in error), error
        assert not (folder / "none").exists()
    with pytest.raises(CliError, match="did you mean 'glue-rte-base'"):
        find("glue-rte-bas")
