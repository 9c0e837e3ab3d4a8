"""`unilora finetune --projection peft`: the trained adapter is one that PEFT loads."""

import pytest
import torch
from test_cli_data import write_model, write_rows

import unilora_ext as ul
from unilora_ext.cli import main
from unilora_ext.integrations.peft import to_peft

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")


def test_peft_loads_a_run_of_the_command_line(tmp_path):
    write_model(tmp_path / "tiny")
    write_rows(tmp_path / "rows.csv", 60)
    command = f"finetune --model {tmp_path}/tiny --data {tmp_path}/rows.csv --output {tmp_path}/run --d 64 --epochs 1"
    assert main([*command.split(), "--projection", "peft"]) == 0

    def base():
        return transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "tiny").eval()

    model = base()
    x = torch.randint(5, model.config.vocab_size, (3, 7))
    adapter = ul.load(model, tmp_path / "run/adapter")
    to_peft(adapter, tmp_path / "peft")
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "peft").eval()
    torch.testing.assert_close(theirs(input_ids=x).logits, model(input_ids=x).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(theirs(input_ids=x).logits, base()(input_ids=x).logits, atol=1e-3)
