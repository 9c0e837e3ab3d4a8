"""What a run tells of itself: its progress, too few steps, its picture."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from test_cli_causal_data import write_decoder, write_records
from test_cli_data import write_model, write_rows

from unilora_ext.cli import main
from unilora_ext.cli.advice import ENOUGH_STEPS, few_steps, hardly_learnt, hardly_moves
from unilora_ext.cli.data import label_entropy, read_rows
from unilora_ext.cli.settings import CAUSAL_LM, CLASSIFICATION

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("progress")
    write_model(folder / "tiny")
    write_rows(folder / "rows.csv", 60)
    return folder


def finetune(folder, *options):
    command = f"finetune --model {folder}/tiny --data {folder}/rows.csv --output {folder}/run --overwrite --d 32"
    return main([*command.split(), *options])


# ---- progress -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "total", "initial"), [(1, 1000, 0), (7, 40, 0), (0.1, 30, 10), (60, 12, 3)])
def test_lines_of_a_log_are_rare(monkeypatch, capsys, seconds, total, initial):
    from unilora_ext.cli import progress

    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    bar = progress._Lines(total, initial, disable=False)
    expected, last, shown = [], 0, initial
    for step in range(initial + 1, total + 1):
        clock[0] += seconds
        bar.set_postfix_str("loss 0.5", refresh=False)
        bar.update(1)
        elapsed = (step - initial) * seconds
        if elapsed - last >= 10 - 1e-9 and (step - shown) * 20 >= total and step < total:
            expected.append(step)
            last, shown = elapsed, step
    out = capsys.readouterr()
    assert out.out == "" and all(char.isprintable() or char == "\n" for char in out.err)
    assert [int(line.split()[1].partition("/")[0]) for line in out.err.splitlines()] == expected
    assert all(
        re.fullmatch(rf"step \d+/{total} \(\d+%\): loss 0.5, about [\d:]+ left", x) for x in out.err.splitlines()
    )


def test_nothing_moves_in_a_log(folder, monkeypatch, capfd):
    from unilora_ext.cli import progress

    monkeypatch.setattr(progress, "SECONDS", 0.0)
    assert finetune(folder, "--epochs", "2") == 0
    out, err = capfd.readouterr()
    steps = [int(line.split()[1].partition("/")[0]) for line in err.splitlines() if line.startswith("step ")]
    assert steps == [1, 2, 3, 4, 5, 6, 7]
    assert not set(out + err) & {"\r", "\x1b", "\b"}


def test_other_processes_are_silent(capsys):
    from unilora_ext.cli.progress import _Lines

    bar = _Lines(2, 0, disable=True)
    bar.last = -math.inf
    bar.update(1)
    bar.close()
    assert capsys.readouterr() == ("", "")


# ---- too few steps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "epochs"), [(1, 1), (17, 3), (ENOUGH_STEPS - 1, 1), (7, 5)])
def test_few_steps_and_what_is_enough(steps, epochs):
    message = few_steps(steps, epochs)
    suggested = int(re.search(r"--epochs (\d+)", message)[1])
    assert f"{steps * epochs} steps" in message
    assert few_steps(steps, suggested) is None and few_steps(steps, suggested - 1) is not None


def test_a_rate_that_hardly_moves_anything():
    assert hardly_moves(2e-4, 190.0, 0.1) is None  # 1.05e-6 an entry
    message = hardly_moves(1e-4, 190.0, 0.1)  # PEFT's default rate and d in a model of 3 B parameters
    assert "5e-07" in message and "190.0" in message and message.endswith("it is 0.1")


def test_hardly_learnt():
    assert hardly_learnt(CLASSIFICATION, 0.69, 0.64, 17, 3) is None
    assert hardly_learnt(CAUSAL_LM, 2.0, 1.96, 17, 3) is None
    assert hardly_learnt(CAUSAL_LM, 2.0, 1.99, 17, 3) is not None
    message = hardly_learnt(CLASSIFICATION, 0.6931, 0.6745, 17, 3)
    assert "0.6745" in message and few_steps(17, int(re.search(r"--epochs (\d+)", message)[1])) is None
    assert "--epochs 40 " in hardly_learnt(CLASSIFICATION, 1.0, 2.0, 1000, 20)


def test_the_loss_of_who_knows_the_shares(tmp_path):
    generator = torch.Generator().manual_seed(torch.initial_seed() % 2**31)
    labels = [*range(4), *torch.randint(4, (50,), generator=generator).tolist()]
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"film,{label}\n" for label in labels))
    target = torch.tensor(labels)
    shares = torch.bincount(target).double() / len(labels)
    expected = torch.nn.functional.cross_entropy(shares.log().expand(len(labels), -1), target)
    assert math.isclose(label_entropy(read_rows(path, "text", "label")), expected.item(), rel_tol=1e-12)


def test_a_run_warns_before_and_after(folder, capsys):
    assert finetune(folder, "--epochs", "1", "--lr-theta", "1e-9", "--lr-head", "1e-9") == 0
    plan, _, rest = capsys.readouterr().out.partition("epoch 1/1")
    assert "warning: 4 steps in all are few to learn from" in plan and f"--epochs {-(-ENOUGH_STEPS // 4)} " in plan
    assert "this run hardly learnt anything" in rest
    more = write_rows(folder / "more.csv", 200)
    options = f"--data {more} --batch-size 8 --epochs 7 --d 64 --lr-theta 0.2 --lr-head 0.02"
    assert finetune(folder, *options.split()) == 0
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(("rate", "warned"), [("1e-9", True), ("0.1", False)])
def test_a_language_model_is_warned_of_only_afterwards(folder, tmp_path, capsys, rate, warned):
    write_decoder(tmp_path / "decoder")
    write_records(tmp_path / "records.jsonl", 60)
    command = f"finetune --task causal-lm --model {tmp_path}/decoder --data {tmp_path}/records.jsonl --d 64"
    assert main([*command.split(), "--output", str(tmp_path / "run"), "--lr-theta", rate]) == 0
    out = capsys.readouterr().out
    assert "few to learn from" not in out and ("this run hardly learnt anything" in out) == warned


# ---- picture --------------------------------------------------------------------------------------------------------


def results(figures, test=None, before=None, kind="accuracy"):
    epochs = [
        {"epoch": i, "train_loss": 0.7 / i, "validation_loss": 0.6 / i, f"validation_{kind}": value}
        for i, value in enumerate(figures, 1)
    ]
    sizes = SimpleNamespace(theta_d_bytes=80, lora_bytes=900, model_bytes=7000, d=9, D=90)
    return {
        "epochs": epochs,
        "best_epoch": len(epochs),
        "test": None if test is None else {kind: test},
        **({} if before is None else {"before": {"validation": {kind: before}}}),
        "sizes": vars(sizes),
    }


@pytest.mark.parametrize(
    ("figures", "more"),
    [
        ([0.62], {}),
        ([1.0], {"test": 1.0}),
        ([0.0], {"test": 0.001}),
        ([0.5, 0.97, 0.99], {"test": 0.4}),
        ([75.5], {"kind": "perplexity", "before": 250.8}),
        ([math.inf, 9.0], {"kind": "perplexity", "before": math.inf}),
    ],
)
def test_axes_of_the_picture(tmp_path, figures, more):
    from unilora_ext.cli.report import draw, picture

    made = results(figures, **more)
    drawn = picture(made)
    for axes in drawn.axes[:2]:
        low, high = axes.get_xlim()
        assert (low, high) == (0.5, len(figures) + 0.5)
        assert [tick for tick in axes.get_xticks() if low <= tick <= high] == list(range(1, len(figures) + 1))
    low, high = drawn.axes[1].get_ylim()
    values = [value for value in [*figures, more.get("test"), more.get("before")] if value not in (None, math.inf)]
    span = max(values) - min(values)
    assert 0 <= low <= min(values) and max(values) <= high <= max(values) + max(span, 0.1 * max(values), 0.05)
    assert high <= 1 or more.get("kind") == "perplexity"
    draw(made, tmp_path / "picture.png")
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]
