"""The scripts in examples/, run as a user runs them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import unilora_ext as ul

transformers = pytest.importorskip("transformers")
EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A tiny random Llama with a tokenizer of letters, and a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("model")
    tokens = ["<eos>", *"abcdefghij"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=12, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=21, max_position_embeddings=32, pad_token_id=0, eos_token_id=0, bos_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    lines = [" ".join(tokens[i] for i in torch.randint(1, 11, (int(torch.randint(4, 9, ())),))) for _ in range(16)]
    (folder / "text.txt").write_text("\n".join(lines))
    return folder


def test_fsdp_example(language_model, tmp_path):
    """torchrun with 2 processes gives the adapter that a plain loop gives, up to the order of float32 sums."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--model", language_model, "--text", language_model / "text.txt", "--output", "adapter"]
    result = subprocess.run(
        [*command, EXAMPLES / "fsdp.py", *options, "--length", "200", "--batch-size", "4", "--lr", "0.01"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-3000:]

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(language_model, dtype=torch.float32)
    adapter = ul.attach(model, ul.UniLoRAConfig(r=4, d=200, target_modules="all-linear"))
    start, optimizer, losses = adapter.theta_d.detach().clone(), torch.optim.AdamW([adapter.theta_d], lr=0.01), []
    lines = (language_model / "text.txt").read_text().splitlines()
    for first in range(0, 16, 4):
        sums = tokens = 0
        for line in lines[first : first + 4]:
            ids = torch.tensor([["abcdefghij".index(letter) + 1 for letter in line.split()]])
            logits = model(ids).logits[0, :-1]
            sums += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
            tokens += ids.shape[1] - 1
        losses.append(float(sums / tokens))
        (sums / tokens).backward()
        torch.nn.utils.clip_grad_norm_([adapter.theta_d], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    printed = [float(number) for number in re.findall(r"loss (\S+)", result.stdout)]
    assert printed == pytest.approx(losses, abs=1e-3)
    saved = ul.read(tmp_path / "adapter").theta_d
    assert (saved - adapter.theta_d).norm() < 1e-3 * (saved - start).norm()
