"""Tiny random models of the recipes' architectures, and data in the formats of their data sets."""

import random

import tokenizers
import torch
import transformers
from test_cli_causal_data import make_tokenizer
from test_cli_data import WORDS

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def write_roberta(folder):
    """As published, but for its size and words: pairs are separated by two </s>, positions begin at 2."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *WORDS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "unk", "mask")}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>", **names,
        model_max_length=512,
    ).save_pretrained(folder)  # fmt: skip
    config = transformers.RobertaConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=514, type_vocab_size=1, initializer_range=0.2, pad_token_id=1, bos_token_id=0,
        eos_token_id=2,
    )  # fmt: skip
    transformers.RobertaForMaskedLM(config).save_pretrained(folder)
    return folder


def write_decoder(folder, architecture):
    """A causal language model of ``Mistral``, ``Gemma`` or ``Llama``'s architecture. Its sizes are those that four bits
    can be packed to on a CPU."""
    tokenizer = make_tokenizer(bos=True)
    tokenizer.model_max_length = 1024
    tokenizer.save_pretrained(folder)
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=128, head_dim=16, max_position_embeddings=1024, initializer_range=0.2, bos_token_id=1,
        eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    getattr(transformers, f"{architecture}ForCausalLM")(config).save_pretrained(folder)
    return folder


def sentence(generator, kind=WORDS):
    return " ".join(generator.choice(kind) for _ in range(generator.randint(3, 7)))


def glue_split(columns, count, numbers):
    """Columns of a GLUE task: what the first sentence is like decides the label."""
    generator = random.Random(int(torch.randint(2**31, ())))
    labels = [i % 2 for i in range(count)]
    split = {column: [sentence(generator) for _ in labels] for column in columns}
    split[columns[0]] = [sentence(generator, WORDS[3 * label : 3 * label + 3]) for label in labels]
    split["label"] = [5 * label - generator.random() * label for label in labels] if numbers else labels
    return {**split, "idx": list(range(count))}


def write_vit(folder):
    """A vision transformer for images of 16 x 16 pixels, and its image processor."""
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    config = transformers.ViTConfig(
        image_size=16, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        initializer_range=0.2,
    )  # fmt: skip
    transformers.ViTModel(config).save_pretrained(folder)
    return folder


def image_split(datasets, columns, count):
    """Noise that is dark, grey or bright, by the label."""
    from PIL import Image

    labels = [i % 3 for i in range(count)]
    pixels = [(torch.rand(20, 18, 3) * 80 + 80 * label).byte().numpy() for label in labels]
    image, label = columns
    rows = datasets.Dataset.from_dict({image: list(map(Image.fromarray, pixels)), label: labels})
    return rows.cast_column(image, datasets.Image()).cast_column(label, datasets.ClassLabel(names=["c", "a", "b"]))
