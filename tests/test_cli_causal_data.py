"""Records of a causal language model and what is learnt of them. Holds the tiny decoder of the other tests, too."""

import json
import random

import pytest
import torch

from unilora_ext.cli.conversations import Record, read_conversations, split_conversations, write_conversations
from unilora_ext.cli.errors import CliError

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from unilora_ext.cli.encoding import IGNORED, encode, pad, prompt_ids  # noqa: E402 (needs transformers' tokenizers)

CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}{% if loop.last or m['role'] != 'assistant' %}{{ m['content'] }}{% endif %}{% endfor %}"
)
STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('the user begins') }}{% endif %}" + CHAT


def make_tokenizer(template=CHAT, merges=(), bos=False):
    """Bytes, and the merges given."""
    special = ["<unk>", "<s>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *letters, *("".join(pair) for pair in merges)])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=list(merges), unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    if bos:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A <|im_end|>", special_tokens=[("<s>", 1), ("<|im_end|>", 3)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=96,
        chat_template=template,
    )


def write_decoder(folder, **options):
    """A Llama of two layers, random but for the seed. It has no padding token."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=40,
        max_position_embeddings=96,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=3,
        **options,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_records(path, count, seed=0):
    """Of all three kinds: a word, and the same in capitals."""
    generator = random.Random(seed)
    with open(path, "w") as file:
        for i in range(count):
            word = "".join(generator.choice("abc") for _ in range(generator.randint(3, 12)))
            turns = [{"role": "user", "content": word}, {"role": "assistant", "content": word.upper()}]
            records = (
                {"text": f"{word} {word.upper()}"},
                {"prompt": f"say {word}: ", "completion": word.upper()},
                {"messages": turns},
            )
            file.write(json.dumps(records[i % 3]) + "\n")
    return path


def learnt_text(tokenizer, example):
    return tokenizer.decode([token for token in example["labels"] if token != IGNORED])


def only(encoded):
    (example,) = encoded.examples
    return example


def test_text_is_learnt_whole_and_ends():
    tokenizer = make_tokenizer()
    example = only(encode(tokenizer, [Record({"text": "caf\u00e9 ab"}, "here")], 50))
    assert tokenizer.decode(example["input_ids"]) == "caf\u00e9 ab<|im_end|>"
    assert example["labels"] == [IGNORED, *example["input_ids"][1:]]  # nothing comes before the first


def test_a_tokenizer_that_opens_and_closes_texts_by_itself():
    tokenizer = make_tokenizer(bos=True)
    text, completion = encode(
        tokenizer, [Record({"text": "ab"}, "1"), Record({"prompt": "ab", "completion": "cd"}, "2")], 50
    ).examples
    assert tokenizer.decode(text["input_ids"]) == "<s>ab<|im_end|>"
    assert tokenizer.decode(completion["input_ids"]) == "<s>abcd<|im_end|>"
    assert learnt_text(tokenizer, completion) == "cd<|im_end|>"
    assert prompt_ids(tokenizer, Record({"prompt": "ab"}, "")) == completion["input_ids"][:3]


def test_completion_alone_is_learnt_from_the_tokens_of_its_prompt():
    tokenizer = make_tokenizer(merges=[("a", "b")])  # "ab" is one token: a prompt that ends in "a" ends within it
    records = [Record({"prompt": "ca", "completion": completion}, "") for completion in ("b", "c")]
    encoded = encode(tokenizer, records, 50)
    for example, completion in zip(encoded.examples, "bc", strict=True):
        assert learnt_text(tokenizer, example) == completion + "<|im_end|>"
        prompt = prompt_ids(tokenizer, records[0])
        assert example["input_ids"][: len(prompt)] == prompt and set(example["labels"][: len(prompt)]) == {IGNORED}
    assert encoded.counts.apart == 1


TURNS = [("system", "be kind"), ("user", "hi"), ("assistant", "hello"), ("user", "bye"), ("assistant", "farewell")]


@pytest.mark.parametrize(("template", "between"), [(CHAT, "\n"), (MARKED, "")])
def test_assistant_turns_alone_are_learnt(template, between):
    tokenizer = make_tokenizer(template)
    record = Record({"messages": [{"role": role, "content": content} for role, content in TURNS]}, "")
    example = only(encode(tokenizer, [record], 200))
    assert tokenizer.decode(example["input_ids"]) == "".join(f"<|im_start|>{r}\n{c}<|im_end|>\n" for r, c in TURNS)
    assert learnt_text(tokenizer, example) == f"hello<|im_end|>{between}farewell<|im_end|>{between}"
    prompt = tokenizer.decode(prompt_ids(tokenizer, record))
    assert prompt.endswith("bye<|im_end|>\n<|im_start|>assistant\n") and "farewell" not in prompt


@pytest.mark.parametrize(
    ("template", "roles", "expected"),
    [
        (FORGETFUL, "ua ua", "place: message 2: expected a chat template that writes a conversation's beginning"),
        (STRICT, "au", "place: expected messages that the chat template takes; it refused: the user begins"),
        (None, "ua", "place: 'messages': expected a tokenizer with a chat template"),
    ],
)
def test_conversations_that_cannot_be_told_apart_are_refused(template, roles, expected):
    messages = [
        {"role": {"u": "user", "a": "assistant"}[r], "content": f"{i}"} for i, r in enumerate(roles.replace(" ", ""))
    ]
    with pytest.raises(CliError, match=expected.replace("'", ".")):
        encode(make_tokenizer(template), [Record({"messages": messages}, "place")], 50)


def test_what_is_cut_off_is_counted():
    tokenizer = make_tokenizer()
    records = [
        Record({"text": "a" * 9}, "1"),
        Record({"text": "a" * 10}, "2"),  # its end is cut
        Record({"prompt": "a" * 9, "completion": "bcd"}, "3"),  # one token of its completion is left
        Record({"prompt": "a" * 10, "completion": "bcd"}, "4"),  # none
    ]
    encoded = encode(tokenizer, records, 10)
    assert [len(example["input_ids"]) for example in encoded.examples] == [10, 10, 10]
    assert learnt_text(tokenizer, encoded.examples[2]) == "b"
    counts = encoded.counts.asdict()
    assert counts == {"records": 3, "tokens": 30, "learnt": 19, "truncated": 3, "skipped": 1, "apart": 0}
    with pytest.raises(CliError, match="expected at least one record with something to learn in its first 10 tokens"):
        encode(tokenizer, records[3:], 10)


def test_padding_is_masked_and_not_learnt():
    batch = pad([{"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]}, {"input_ids": [8], "labels": [IGNORED]}], 0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED] * 3]


def test_files_of_every_kind(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n  two\n")
    (tmp_path / "a.csv").write_text('body,label\n"one\ntwo",1\n')
    assert [r.fields for r in read_conversations(tmp_path / "a.txt", "text")] == [{"text": "one"}, {"text": "  two"}]
    (record,) = read_conversations(tmp_path / "a.csv", "body")
    assert record == Record({"text": "one\ntwo"}, f"{tmp_path / 'a.csv'}, line 2")
    records = read_conversations(write_records(tmp_path / "a.jsonl", 20), "text")
    training, validation = split_conversations(records, 0.2, seed=1)
    assert (len(training), len(validation)) == (16, 4) and sorted(training + validation, key=records.index) == records
    write_conversations(tmp_path / "b.jsonl", validation, "text")
    assert [r.fields for r in read_conversations(tmp_path / "b.jsonl", "text")] == [r.fields for r in validation]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"text": "a"', "expected a JSON object"),
        ("[1]", "expected a JSON object, got [1]"),
        ('{"body": "a"}', "expected one of the keys 'text', 'prompt' (with 'completion') and 'messages', got ['body']"),
        ('{"text": "a", "messages": []}', "got ['text', 'messages']"),
        ('{"text": " "}', "'text': expected a text, got ' '"),
        ('{"prompt": "a"}', "expected a key 'completion' beside 'prompt', got ['prompt']"),
        ('{"prompt": "a", "completion": 3}', "'completion': expected a text, got 3"),
        ('{"messages": "hi"}', "'messages': expected a list of messages, got 'hi'"),
        ('{"messages": ["hi"]}', "message 1: expected an object with 'role' and 'content', got 'hi'"),
        ('{"messages": [{"role": "user"}]}', "message 1: 'content': expected a text, got nothing"),
        ('{"messages": [{"role": 1, "content": "a"}]}', "message 1: 'role': expected a text, got 1"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "expected a turn of the role 'assistant', got none"),
    ],
)
def test_bad_records_are_named(tmp_path, line, expected):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(CliError) as error:
        read_conversations(path, "text")
    assert str(error.value).startswith(f"{path}, line 3: ") and expected in str(error.value)
