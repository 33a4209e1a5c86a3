"""`rlchat chat`: talk with a model in the terminal, or through a pipe.

rlchat chat
rlchat chat "Where does Anna live?"
echo "Where does Anna live?" | rlchat chat checkpoints/sft_model.pt --temperature 0
rlchat chat --prompts questions.txt --out replies.json
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import time
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlchat.chat import commands
from rlchat.chat.feedback import Correction, Verdict
from rlchat.conversation import Conversation
from rlchat.data.formats import read_prompts
from rlchat.errors import UserError
from rlchat.utils.files import write_atomically
from rlchat.utils.imports import no_garbage_collection

if TYPE_CHECKING:
    from rlchat.chat.interface import ChatInterface
    from rlchat.chat.terminal import Terminal

DEFAULT_MODEL = "checkpoints/rl_chat_model_tiktoken.pt"

_INTERRUPTED = 130  # the exit code of a program that Ctrl-C ended
_FAILED = 2  # that of a command that could not do what it was told


def main(args: list[str]) -> int:
    """Runs ``rlchat chat`` with ``args``; returns the exit code. Raises :class:`rlchat.errors.UserError`."""
    try:
        options = _parser().parse_intermixed_args(args)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        return _run(options)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # Whoever read the replies has left. Python would write what is buffered once more at its own exit, and fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rlchat chat", description="Talk with a model, in the terminal or a pipe.")
    parser.add_argument(
        "words",
        nargs="*",
        metavar="[MODEL] [QUESTION]",
        help=f"a model bundle (default: {DEFAULT_MODEL}), and a question to answer before leaving; a word alone is the "
        "model where it ends in .pt or is a file",
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
    parser.add_argument("--prompts", metavar="FILE", help="reply to the lines of a .txt file, or to rows of JSONL")
    parser.add_argument("--out", metavar="FILE", help="where the replies to --prompts go, as JSON (default: stdout)")
    parser.add_argument("--force", action="store_true", help="overwrite files without asking")
    parser.add_argument(
        "--feedback",
        metavar="FILE",
        default="feedback.jsonl",
        help="where good, bad and edit put what you think, as data for `rlchat fit` (default: %(default)s)",
    )
    parser.add_argument("--device", help="cpu, cuda or mps (default: the fastest there is)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: bfloat16 on CUDA that has it)")
    return parser


def _run(options: argparse.Namespace) -> int:
    model, question = _model_and_question(options.words)
    if question is not None and not question.strip():
        raise UserError("the message is empty; write something to reply to")
    if options.prompts is not None and question is not None:
        raise UserError("--prompts brings the questions; leave out the one on the command line, or --prompts")
    if options.out is not None and options.prompts is None:
        raise UserError("--out is for the replies to --prompts; name a file of prompts too")
    prompts = None if options.prompts is None else read_prompts(options.prompts, cure="fix the line")
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a stray byte, or a character that the terminal lacks, ends no chat
    if interactive and question is None:
        print(f"loading {model} …", flush=True)
    # Not before the arguments are known to be good: this imports torch, which takes seconds.
    with no_garbage_collection():
        from rlchat.chat.interface import ChatInterface, sampling_from

        sampling = sampling_from(options.max_new_tokens, options.temperature, options.top_k, options.top_p)
        chat = ChatInterface(model, device=options.device, dtype=options.dtype, seed=options.seed)
    talk = Talk(chat, asdict(sampling), feedback=options.feedback, force=options.force)
    if interactive and question is None:
        from rlchat.chat.terminal import Terminal

        talk.terminal = Terminal()
    if prompts is not None:
        talk.reply_to_all(prompts, None if options.out is None else Path(options.out).expanduser())
    elif question is not None:
        talk.say(question)
    else:
        talk.talk()
    return _FAILED if talk.failed and not interactive else 0


def _model_and_question(words: list[str]) -> tuple[str, str | None]:
    if len(words) > 2:
        raise UserError("more than a model and a question; put the question into quotes")
    if len(words) == 2:
        return words[0], words[1]
    if not words:
        return DEFAULT_MODEL, None
    (word,) = words
    is_model = word.endswith(".pt") and not any(map(str.isspace, word))
    with contextlib.suppress(OSError, ValueError):  # a question may be too long for a path, or hold what none can
        is_model = is_model or Path(word).is_file()
    return (word, None) if is_model else (DEFAULT_MODEL, word)


@dataclass(slots=True)
class Talk:
    """One chat, and what commands do with it. Through a pipe, standard output holds the replies and nothing else."""

    chat: ChatInterface
    how: dict[str, Any]  # how to sample: arguments of stream_response
    feedback: str = "feedback.jsonl"
    force: bool = False
    terminal: Terminal | None = None  # None: a pipe
    failed: bool = False
    _told_of_dropped: bool = field(default=False, init=False)
    _seconds: float = field(default=0.0, init=False)

    def talk(self) -> None:
        """Replies to message after message, until a command or the end of the input."""
        messages: Iterable[str] = sys.stdin
        if self.terminal is not None:
            parameters = sum(weight.numel() for weight in self.chat.model.parameters())
            self.note(f"{parameters:,} parameters on {self.chat.device}; help lists the commands, Ctrl-D leaves")
            messages = self.terminal.messages()
        for message in messages:
            if self._obey(message.strip()):
                return

    def _obey(self, text: str) -> bool:
        """Does what ``text`` says, or replies to it; returns whether the talk is over."""
        try:
            if (found := commands.find(text)) is not None:
                command, argument = found
                return bool(command.run(self, argument))
            if text:
                self.say(text)
        except UserError as error:
            self.note(str(error))
            self.failed = True
        except KeyboardInterrupt:
            if self.terminal is None:
                raise
            self.note("(stopped)")
        return False

    def say(self, text: str) -> None:
        """Says the reply to ``text`` as it is made. Raises :class:`UserError` for an empty text.

        Ctrl-C stops the reply, and without a terminal to type the next message at, all: it is raised again.
        """
        interactive = self.terminal is not None
        stopped = ""
        began = time.perf_counter()
        pieces = self.chat.stream_response(text, **self.how)
        try:
            if interactive:
                print("model> ", end="", flush=True)
            # Closed at once, so that what was said until Ctrl-C is in the history before the next message.
            with contextlib.closing(pieces):
                for piece in pieces:
                    print(without_controls(piece) if sys.stdout.isatty() else piece, end="", flush=True)
        except KeyboardInterrupt:
            if not interactive:
                print(flush=True)
                raise
            stopped = " (stopped)"
        self._seconds = time.perf_counter() - began
        print(stopped, flush=True)
        self.tell_what_was_not_seen()

    def reply_to_all(self, prompts: Sequence[Conversation], out: Path | None) -> None:
        """Writes the replies to ``prompts`` as JSON to ``out``, or to standard output where that is None.

        Raises :class:`UserError` where ``out`` exists and there is nobody to ask.
        """
        from rlchat.chat.batch import as_json, reply_to_all
        from rlchat.models.sampling import Sampling

        if out is not None and not self.may_write(out):
            self.note("nothing was written")
            return
        text = as_json(reply_to_all(self.chat, prompts, Sampling(**self.how)))
        if self.chat.dropped_messages or self.chat.cut_tokens:
            self.note(
                f"some prompts are longer than the model sees: {self.chat.dropped_messages} of their oldest messages "
                f"and {self.chat.cut_tokens} tokens were left out"
            )
        if out is None:
            print(text, end="", flush=True)
        else:
            write_atomically(out, lambda file: file.write(text.encode("utf-8", errors="replace")))
            self.note(f"wrote {len(prompts)} replies to {out}")

    def tell_what_was_not_seen(self) -> None:
        """Notes that the last reply knew only a part of the conversation; of forgetting, when it begins."""
        if self.chat.cut_tokens:
            self.note(f"(too long for this model: it did not see the first {self.chat.cut_tokens} tokens of this)")
        if self.chat.dropped_messages and not self._told_of_dropped:
            self.note("(the conversation has outgrown what this model sees: it forgets the oldest messages first)")
        self._told_of_dropped = self.chat.dropped_messages > 0

    def note(self, text: str) -> None:
        """Says something that is no reply."""
        print(without_controls(text), file=sys.stderr if self.terminal is None else sys.stdout, flush=True)

    def ask(self, question: str, default: str = "") -> str:
        """What a person answers; empty through a pipe."""
        return "" if self.terminal is None else self.terminal.ask(question, default)

    def may_write(self, path: Path) -> bool:
        """Whether ``path`` may be written.

        Raises :class:`UserError` for a directory, and where there is a file and nobody to ask.
        """
        if path.is_dir():
            raise UserError(f"{path} is a directory; give the name of a file")
        if self.force or not path.exists():
            return True
        if self.terminal is None:
            raise UserError(f"{path} exists; give another name, or start rlchat chat with --force")
        return self.ask(f"{path} exists; overwrite it? [y/N] ").strip().lower() in ("y", "yes")

    def judge(self, verdict: Verdict) -> None:
        """Keeps what somebody thinks of the last reply."""
        kept = "kept" if self.chat.judge(verdict, self.feedback) else "already kept"
        what = "the corrected reply" if isinstance(verdict, Correction) else f"a {verdict} reply"
        self.note(f"{kept} in {self.feedback} as {what}")

    def settings(self) -> dict[str, Any]:
        """How replies are sampled, by the names of :data:`rlchat.chat.commands.SETTINGS`."""
        values = {**self.how, "seed": "none" if self.chat.seed is None else self.chat.seed}
        return {name: values[name] for name in commands.SETTINGS}

    def set(self, name: str, value: str) -> None:
        """Changes one setting from the next reply on. Raises :class:`UserError` where it cannot have that value."""
        if name not in commands.SETTINGS:
            raise UserError(f"there is no setting {name!r}; there are {', '.join(commands.SETTINGS)}")
        number: float | None = None
        try:
            if (name, value.lower()) != ("seed", "none"):
                number = float(value) if name in ("temperature", "top_p") else int(value)
        except ValueError:
            kind = "a number" if name in ("temperature", "top_p") else "a whole number"
            raise UserError(f"{name} is {kind}, and not {value!r}; type, for instance, set {name} 1") from None
        self._change(name, number)

    def adopt(self, sampling: Mapping[str, Any]) -> None:
        """Changes all settings that ``sampling`` has, but for those that are out of range: it notes what they are."""
        for name, value in sampling.items():
            try:
                self._change(name, value)
            except UserError as error:
                self.note(f"{name} stays {self.settings()[name]}: {error}")

    def _change(self, name: str, value: Any) -> None:
        from rlchat.chat.interface import sampling_from

        if name == "seed":
            self.chat.reseed(value)
        else:
            self.how = asdict(sampling_from(**{**self.how, name: value}))

    def speed(self) -> str:
        """How fast the last reply came. Raises :class:`UserError` where there is none."""
        if (turn := self.chat.last_turn) is None or not self._seconds:
            raise UserError("nothing was said here yet; say something first")
        tokens = turn[1].tokens
        return f"{tokens} tokens in {self._seconds:.2f} s: {tokens / self._seconds:.0f} tokens per second"


def without_controls(text: str) -> str:
    """``text`` without the control characters by which a model could drive the terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
