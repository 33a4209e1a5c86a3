"""The command line: `rlchat COMMAND`. It imports only the requested command, so that help is instant."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rlchat.errors import UserError, limit_reached

COMMANDS = {
    "demo": "run all stages in a few minutes: conversations, SFT, reward model, PPO",
    "fit": "train one stage: rlchat fit --config demo/ppo",
    "validate": "measure a model on the validation split",
    "test": "measure a model on the held-out test split",
    "predict": "write responses to a file of prompts as JSONL",
    "learn": "make a new version of a chat model from 👍, 👎 and corrections, if it passes a gate",
    "look": "look at the rollouts of a PPO run token by token, on a page at http://127.0.0.1:8010",
    "report": "write a page about a run: figures before and after, plots, samples, alarms",
    "chat": "chat with a model in the terminal",
    "serve": "serve a web page and an API to chat with a model, at http://127.0.0.1:8000",
    "study": "optimize proxy rewards until the true reward falls: rlchat study overoptimization",
    "data": "generate prompts with answers that can be checked, from reasoning-gym",
    "tokenizer": "train a tokenizer (a tiktoken rank file) on your own data",
    "export": "write a chat model for transformers, llama.cpp or safetensors",
    "cache": "show or clear tokenized data and unpacked base models",
}

TRAINER_COMMANDS = ("fit", "validate", "test", "predict")


def main(args: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code.

    The exit code is 0, 2 after an error (one sentence on stderr that names the fix), or 130 after Ctrl-C.
    """
    argv = list(sys.argv[1:] if args is None else args)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if argv[0] == "--version":
        from importlib.metadata import version

        print(version("rlchat"))
        return 0
    command, rest = argv[0], argv[1:]
    if command not in COMMANDS:
        print(f"rlchat: unknown command {command!r}; choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    if command in TRAINER_COMMANDS and not rest:
        from rlchat.cli.recipes import describe_recipes

        print(
            f"rlchat {command}: set --config to a recipe or to your own file:\n\n{describe_recipes()}",
            file=sys.stderr,
        )
        return 2
    try:
        return _run(command)(_with_homes(rest))
    except UserError as error:
        print(f"{error.details}rlchat: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"\nrlchat: {str(stop) or 'stopped'}", file=sys.stderr)
        return 130
    except Exception as error:
        if (limit := limit_reached(error)) is None:
            raise
        print(f"rlchat: {limit}", file=sys.stderr)
        return 2


def _with_homes(words: Sequence[str]) -> list[str]:
    """``words`` with the home folder for ``~``, which a shell leaves in ``--option=~/file`` and in quotes.

    Configuration files and environment variables follow in :func:`rlchat.cli.settings.with_home`. A sentence that
    begins with ``~`` and is not the value of an option, such as a question of `rlchat chat`, stays as it is.
    """
    found = []
    for before, word in zip(["", *words], words, strict=False):
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        is_value = bool(equals) or (before.startswith("--") and "=" not in before)
        is_sentence = not is_value and any(map(str.isspace, value)) and not _exists(value)
        expanded = str(Path(value).expanduser()) if value.startswith("~/") and not is_sentence else value
        found.append(flag + equals + expanded)
    return found


def _exists(path: str) -> bool:
    return os.path.exists(Path(path).expanduser())  # noqa: PTH110 (a sentence may be too long for Path.exists)


def _run(command: str) -> Callable[[list[str]], int]:
    if command in TRAINER_COMMANDS:
        from rlchat.cli import main as cli

        return lambda rest: cli.main([command, *rest])
    if command == "chat":
        from rlchat.chat import repl

        return repl.main
    if command == "look":
        from rlchat.look import main as look

        return look.main
    if command == "report":
        from rlchat.look import report

        return report.main
    if command == "serve":
        from rlchat.server import main as server

        return server.main
    if command == "demo":
        from rlchat.demo import main as demo

        return demo.main
    if command == "study":
        from rlchat.study import main as study

        return study.main
    if command == "learn":
        from rlchat.learn import main as learn

        return learn.main
    if command == "export":
        from rlchat.cli import export

        return export.main
    if command == "data":
        from rlchat.tasks import main as tasks

        return tasks.main
    if command == "cache":
        from rlchat.cli import cache

        return cache.main
    from rlchat.cli import tokenizer as tokenizer_cli

    return tokenizer_cli.main


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: rlchat COMMAND [options]",
            "",
            "Train a chat model with reinforcement learning from feedback.",
            "",
            *lines,
            "",
            "rlchat COMMAND --help shows the options of a command.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
