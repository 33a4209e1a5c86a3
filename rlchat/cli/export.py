"""`rlchat export`: a chat model in the formats of other programs.

rlchat export checkpoints/rl_chat_model_tiktoken.pt --to hf my-model
rlchat export checkpoints/rl_chat_model_tiktoken.pt --to peft my-adapter
rlchat export checkpoints/rl_chat_model_tiktoken.pt --to gguf my-model.gguf
rlchat export checkpoints/rl_chat_model_tiktoken.pt --to safetensors my-model.safetensors
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch

from rlchat.errors import UserError
from rlchat.export import adapter
from rlchat.export.card import CardFacts, model_card, read_figures
from rlchat.export.folder import FILES, write_folder
from rlchat.export.gguf_file import check_available, write_gguf
from rlchat.export.output import check_file, check_folder
from rlchat.export.weights import write_safetensors
from rlchat.models.model_file import load_policy
from rlchat.runs.report import LOGS, find_run, read_report

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def main(args: list[str]) -> int:
    """Runs ``rlchat export`` with ``args``; returns the exit code.

    Raises :class:`UserError` for a model file that cannot be loaded or exported, and an output that already exists
    (without ``--force``) or cannot be written.
    """
    try:
        options = _parser().parse_args(args)
    except SystemExit as stop:
        return int(stop.code or 0)
    output: Path = options.output
    if options.to in ("hf", "peft"):
        check_folder(output, FILES if options.to == "hf" else adapter.FILES, options.force)
    else:
        check_file(output, f".{options.to}", options.force)
    if options.to == "gguf":
        check_available()
    if options.license and not re.fullmatch(r"[\w.+-]+", options.license):
        raise UserError(f"invalid value {options.license!r} for --license: expected an identifier such as apache-2.0")
    figures = read_figures(options.figures) if options.figures else {}
    run = read_report(find_run(options.run)) if options.run else None
    facts = CardFacts(options.data, options.license, figures, run)
    base = adapter.base_of(options.model, options.base_model) if options.to == "peft" else None
    bundle = load_policy(options.model, base_model=options.base_model)
    dtype = _DTYPES[options.dtype]
    if options.to in ("hf", "peft"):
        card = model_card(bundle, output.resolve().name, facts)
        if base is None:
            write_folder(bundle, output, card, dtype)
        else:
            adapter.write_adapter(options.model, bundle, base, output, card, dtype)
    elif options.to == "gguf":
        write_gguf(bundle, output, output.stem, options.license, dtype)
    else:
        write_safetensors(bundle, output, dtype)
    print(_summary(options.to, output))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rlchat export",
        description="Export a chat model for transformers, llama.cpp, or any program that reads safetensors.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="the model file (.pt) of a chat model")
    parser.add_argument(
        "--to",
        choices=("hf", "peft", "gguf", "safetensors"),
        required=True,
        help="hf: a folder for transformers, with tokenizer, chat template and model card; peft: the same with the "
        "adapter of an adapter file alone (needs the extra lora); gguf: a file for llama.cpp (needs the extra export); "
        "safetensors: the weights alone, value head included",
    )
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="the folder or file to write")
    parser.add_argument(
        "--dtype", choices=_DTYPES, default="float32", help="type of the weights (default: %(default)s)"
    )
    parser.add_argument(
        "--base-model", metavar="PATH", help="the base of an adapter file (default: where it was in training)"
    )
    parser.add_argument("--data", default="", metavar="TEXT", help="the training data, for the model card")
    parser.add_argument("--license", default="", metavar="ID", help="the license, for the model card: apache-2.0, …")
    parser.add_argument(
        "--figures",
        type=Path,
        metavar="FILE",
        help="a JSON file with figures for the model card: checkpoints/report.json",
    )
    parser.add_argument(
        "--run",
        type=Path,
        metavar="RUN",
        help=f"the folder of the training run, for figures before and after in the model card: {LOGS}/ppo/version_0",
    )
    parser.add_argument("--force", action="store_true", help="overwrite OUTPUT if an earlier export wrote it")
    return parser


def _summary(to: str, output: Path) -> str:
    how = {
        "hf": f"AutoModelForCausalLM.from_pretrained({str(output)!r}) loads it",
        "peft": f"AutoModelForCausalLM.from_pretrained({str(output)!r}) loads it and its base, with peft",
        "gguf": "llama.cpp runs it, with the chat template in the file",
        "safetensors": "safetensors.torch.load_file reads it",
    }
    return f"wrote {output}; {how[to]}"
