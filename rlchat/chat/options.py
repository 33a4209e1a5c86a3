"""The options of `rlchat chat`."""

from __future__ import annotations

import argparse

from rlchat.chat.learning.options import add_learning_options

DEFAULT_MODEL = "checkpoints/rl_chat_model_tiktoken.pt"


def parser() -> argparse.ArgumentParser:
    """All options of ``rlchat chat``."""
    chat = argparse.ArgumentParser(
        prog="rlchat chat", description="Chat with a model, in the terminal or through a pipe."
    )
    chat.add_argument(
        "words",
        nargs="*",
        metavar="[MODEL] [QUESTION]",
        help=f"a model file (default: {DEFAULT_MODEL}), and a question to answer; a single argument is the model if "
        "it ends in .pt or is a file; text from a pipe is put before the question",
    )
    _add_sampling_options(chat)
    chat.add_argument(
        "--prompts", metavar="FILE", help="respond to each line of a .txt file, or to each row of a JSONL file"
    )
    chat.add_argument(
        "--out", metavar="FILE", help="JSON file for the responses to --prompts (default: standard output)"
    )
    _add_output_options(chat)
    add_learning_options(chat.add_argument_group("learning from feedback"))
    return chat


def _add_sampling_options(chat: argparse.ArgumentParser) -> None:
    chat.add_argument(
        "--temperature",
        type=float,
        default=0.7,
        metavar="T",
        help="0: always the most likely token; 1: sample from the model's distribution (default: %(default)s)",
    )
    chat.add_argument(
        "--max_new_tokens",
        "--max-new-tokens",
        type=int,
        default=100,
        metavar="N",
        help="maximum number of tokens per response (default: %(default)s)",
    )
    chat.add_argument("--seed", type=int, metavar="S", help="random seed, for repeatable responses (default: random)")
    chat.add_argument(
        "--top_k",
        "--top-k",
        type=int,
        default=0,
        metavar="K",
        help="sample from the K most likely tokens; 0 or -1 for all (default: all)",
    )
    chat.add_argument(
        "--top_p",
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the most likely tokens with total probability P (default: %(default)s)",
    )
    chat.add_argument(
        "--best_of",
        "--best-of",
        type=int,
        default=1,
        metavar="N",
        help="generate N responses and show the one with the highest reward, by the reward in the model file "
        "(default: %(default)s)",
    )


def _add_output_options(chat: argparse.ArgumentParser) -> None:
    chat.add_argument("--force", action="store_true", help="overwrite files without asking")
    chat.add_argument(
        "--feedback",
        metavar="FILE",
        default="feedback.jsonl",
        help="file for the feedback of good, bad and edit, which `rlchat fit` can train on (default: %(default)s)",
    )
    chat.add_argument("--base-model", metavar="PATH", help="the base of an adapter file (default: as in training)")
    chat.add_argument("--device", help="cpu, cuda or mps (default: the fastest available)")
    chat.add_argument(
        "--dtype", help="float32, bfloat16 or float16 (default: bfloat16 on CUDA if supported, else float32)"
    )
