"""`rlchat chat`: talk with a model in the terminal, or through a pipe.

rlchat chat
echo "Where does Anna live?" | rlchat chat checkpoints/sft.pt --temperature 0
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlchat.chat import ChatInterface

_INTERRUPTED = 130  # the exit code of a program that Ctrl-C ended


def main(args: list[str]) -> int:
    """Runs ``rlchat chat`` with ``args``; returns the exit code. Raises :class:`rlchat.errors.UserError`."""
    try:
        options = _parser().parse_args(args)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        _open(options).talk()
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # Whoever read the replies has left. Python would write what is buffered once more at its own exit, and fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rlchat chat", description="Talk with a model, in the terminal or a pipe.")
    model = "checkpoints/rl_chat_model_tiktoken.pt"
    parser.add_argument(
        "model", nargs="?", default=model, metavar="MODEL", help="a model bundle (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.7,
        metavar="T",
        help="0 takes the likeliest token, 1 samples as trained (default: %(default)s)",
    )
    parser.add_argument(
        "--max_new_tokens",
        "--max-new-tokens",
        type=int,
        default=100,
        metavar="N",
        help="tokens of a reply at most (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, metavar="S", help="makes the replies repeatable (default: a fresh one)")
    parser.add_argument(
        "--top_k",
        "--top-k",
        type=int,
        default=0,
        metavar="K",
        help="sample from the K likeliest only (default: from all)",
    )
    parser.add_argument(
        "--top_p",
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the likeliest that together have probability P (default: %(default)s)",
    )
    return parser


def _open(options: argparse.Namespace) -> _Talk:
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a stray byte, or a character that the terminal lacks, ends no chat
    if interactive:
        print(f"loading {options.model} …", flush=True)
    # Not before the arguments are known to be good: this imports torch, which takes seconds.
    from rlchat.chat import ChatInterface, sampling_from

    how = {name: getattr(options, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p")}
    sampling_from(**how)
    return _Talk(ChatInterface(options.model, seed=options.seed), how, interactive)


@dataclass(slots=True)
class _Talk:
    """The loop. In a pipe, standard output holds the replies and nothing else."""

    chat: ChatInterface
    how: dict[str, Any]  # how to sample: arguments of stream_response
    interactive: bool
    told_of_dropped: bool = False

    def talk(self) -> None:
        """Replies to line after line, until a command or the end of the input."""
        if self.interactive:
            parameters = sum(weight.numel() for weight in self.chat.model.parameters())
            self.note(f"{parameters:,} parameters on {self.chat.device}; help lists the commands, Ctrl-D leaves")
        for line in _typed_lines() if self.interactive else sys.stdin:
            text = line.strip()
            if (command := _command(text)) is not None:
                if not command.run(self):
                    return
            elif slash := re.match(r"/([^\W\d_]+)(?!\S)", text):
                names = [name for known in COMMANDS for name in known.names]
                (nearest,) = difflib.get_close_matches(slash[1].lower(), names, n=1, cutoff=0.0)
                self.note(f"no command {text}; did you mean {nearest}? help lists them all")
            elif text:
                self.reply(text)

    def reply(self, text: str) -> None:
        """Says the reply to ``text`` as it is made; Ctrl-C stops it."""
        stopped = ""
        try:
            if self.interactive:
                print("model> ", end="", flush=True)
            # Closed at once, so that what was said until Ctrl-C is in the history before the next message.
            with contextlib.closing(self.chat.stream_response(text, **self.how)) as pieces:
                for piece in pieces:
                    print(_without_controls(piece) if self.interactive else piece, end="", flush=True)
        except KeyboardInterrupt:
            stopped = " (stopped)" if self.interactive else ""
        print(stopped, flush=True)
        self.tell_what_was_not_seen()

    def tell_what_was_not_seen(self) -> None:
        """Notes that the last reply knew only a part of the conversation; of forgetting, when it begins."""
        if self.chat.cut_tokens:
            self.note(f"(too long for this model: it did not see the first {self.chat.cut_tokens} tokens of this)")
        if self.chat.dropped_messages and not self.told_of_dropped:
            self.note("(the conversation has outgrown what this model sees: it forgets the oldest messages first)")
        self.told_of_dropped = self.chat.dropped_messages > 0

    def note(self, text: str) -> None:
        """Says something that is no reply."""
        print(text, file=sys.stdout if self.interactive else sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class _Command:
    """A word that is not for the model; ``run`` returns whether the talk goes on."""

    names: tuple[str, ...]
    what: str
    run: Callable[[_Talk], bool]


def _leave(talk: _Talk) -> bool:
    return False


def _clear(talk: _Talk) -> bool:
    talk.chat.clear()
    talk.note("the conversation is forgotten")
    return True


def _help(talk: _Talk) -> bool:
    names = [", ".join(command.names) for command in COMMANDS]
    width = max(map(len, names))
    talk.note("All that you type is a message, but for these words alone on a line (with or without a / before them):")
    for name, command in zip(names, COMMANDS, strict=True):
        talk.note(f"  {name:<{width}}  {command.what}")
    talk.note("Ctrl-C stops a reply, Ctrl-D leaves.")
    return True


COMMANDS = (
    _Command(("quit", "exit", "bye"), "leave", _leave),
    _Command(("clear",), "forget the conversation and begin anew", _clear),
    _Command(("help",), "show this", _help),
)


def _command(text: str) -> _Command | None:
    word = text.removeprefix("/").lower()
    return next((command for command in COMMANDS if word in command.names), None)


def _typed_lines() -> Iterator[str]:
    """What is typed at the prompt, until Ctrl-D."""
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  (gives input() line editing and recall)
    while True:
        try:
            line = input("you> ")
        except KeyboardInterrupt:
            print("\n(Ctrl-D or quit leaves)")
            continue
        except EOFError:
            print()
            return
        yield line


def _without_controls(text: str) -> str:
    """``text`` without the control characters by which a model could drive the terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
