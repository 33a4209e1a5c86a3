"""`rlchat chat`: chat with a model in the terminal or through a pipe.

rlchat chat
rlchat chat "Where does Anna live?"
cat letter.txt | rlchat chat "Summarize this letter."
echo "Where does Anna live?" | rlchat chat checkpoints/sft_model.pt --temperature 0
rlchat chat --learn --every 8
rlchat chat --prompts questions.txt --out replies.json
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import stat
import sys
import time
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlchat.chat import commands
from rlchat.chat.feedback import Correction, Verdict, check_writable
from rlchat.chat.learning.options import supervisor_arguments
from rlchat.chat.options import DEFAULT_MODEL, parser
from rlchat.conversation import Conversation
from rlchat.data.formats import read_prompts
from rlchat.errors import UserError
from rlchat.utils.files import write_atomically
from rlchat.utils.imports import no_garbage_collection

if TYPE_CHECKING:
    from rlchat.chat.interface import ChatInterface
    from rlchat.chat.learning.live import LiveLearning
    from rlchat.chat.terminal import Terminal

_INTERRUPTED = 130  # the exit code after Ctrl-C
_FAILED = 2  # the exit code after an error


def main(args: list[str]) -> int:
    """Run ``rlchat chat`` with ``args``; return the exit code. Raises :class:`rlchat.errors.UserError`."""
    try:
        options = parser().parse_intermixed_args(args)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        return _run(options)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        _discard_output()
        return 0


def _discard_output() -> None:
    """Redirect standard output to the null device: at exit, Python would flush its buffer and fail again."""
    with contextlib.suppress(OSError, ValueError):  # standard output may not be a real file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def write_output(text: str, end: str = "") -> None:
    """Print ``text`` without buffering. Raises :class:`UserError` if that fails, for example on a full disk."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        _discard_output()
        raise OutputError(f"cannot write to standard output: {error.strerror}") from error


class OutputError(UserError):
    """Standard output cannot be written; the chat ends."""


def _run(options: argparse.Namespace) -> int:
    model, question = _model_and_question(options.words)
    if question is not None and not question.strip():
        raise UserError("the message is empty: enter some text")
    if options.prompts is not None and question is not None:
        raise UserError("--prompts and a question cannot be combined: use one of them")
    if options.out is not None and options.prompts is None:
        raise UserError("--out requires --prompts")
    if options.learn and (question is not None or options.prompts is not None):
        raise UserError("--learn needs a chat: it cannot be combined with a question or --prompts")
    learn = supervisor_arguments(options)
    prompts = None if options.prompts is None else read_prompts(options.prompts, cure="fix the line")
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # do not fail on invalid bytes or unsupported characters
    if question is not None and (document := _piped_document()).strip():
        question = f"{document.rstrip()}\n\n{question}"
    if interactive and question is None:
        print(f"loading {model} …", flush=True)
    session = _session(options, model, learn)
    try:
        if prompts is not None:
            session.respond_to_all(prompts, None if options.out is None else Path(options.out))
        elif question is not None:
            session.respond(question)
        else:
            if interactive:
                from rlchat.chat.terminal import Terminal

                live = session.learning
                session.terminal = Terminal() if live is None else Terminal(session.news, live.toolbar)
            session.run()
    finally:
        session.close()
    return _FAILED if session.failed and not interactive else 0


def _session(options: argparse.Namespace, model: str, learn: dict[str, Any]) -> Session:
    """Load the model. Raises :class:`UserError` for options and files that cannot be used."""
    # After the checks of the arguments, because this imports torch, which takes seconds.
    with no_garbage_collection():
        from rlchat.chat.generation import positive_integer, sampling_from
        from rlchat.chat.interface import ChatInterface

        sampling = sampling_from(options.max_new_tokens, options.temperature, options.top_k, options.top_p)
        positive_integer("best_of", options.best_of)  # before the model is loaded
        path, base_model = Path(model), options.base_model
        learning = None
        if options.learn:
            from rlchat.chat.learning.live import LiveLearning
            from rlchat.chat.learning.round_options import check_for_model

            check_for_model(learn["options"], path)
            check_writable(options.feedback)
            learning = LiveLearning(path, Path(options.feedback), base_model, **learn)
            path, base_model = learning.path, learning.base_model
        try:
            chat = ChatInterface(
                path, device=options.device, dtype=options.dtype, seed=options.seed, base_model=base_model
            )
            chat.best_of = options.best_of
        except BaseException:
            if learning is not None:
                learning.close()
            raise
    return Session(chat, asdict(sampling), feedback=options.feedback, force=options.force, learning=learning)


def _piped_document() -> str:
    """The text on standard input if that is a pipe or a file, else nothing (a terminal, /dev/null)."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):
        return ""
    return sys.stdin.read() if stat.S_ISFIFO(mode) or stat.S_ISREG(mode) else ""


def _model_and_question(words: list[str]) -> tuple[str, str | None]:
    if len(words) > 2:
        raise UserError("too many arguments: expected a model and a question; put the question in quotes")
    if len(words) == 2:
        return words[0], words[1]
    if not words:
        return DEFAULT_MODEL, None
    (word,) = words
    is_model = word.endswith(".pt") and not any(map(str.isspace, word))
    with contextlib.suppress(OSError, ValueError):  # a question may be too long for a path, or contain a NUL
        is_model = is_model or Path(word).is_file()
    return (word, None) if is_model else (DEFAULT_MODEL, word)


@dataclass(slots=True)
class Session:
    """One chat in a terminal or through a pipe. In a pipe, standard output holds only the responses."""

    chat: ChatInterface
    sampling: dict[str, Any]  # arguments of stream_response
    feedback: str = "feedback.jsonl"
    force: bool = False
    terminal: Terminal | None = None  # None: a pipe
    learning: LiveLearning | None = None  # None: without --learn
    failed: bool = False
    _reported_dropped: bool = field(default=False, init=False)
    _seconds: float = field(default=0.0, init=False)
    _hints: set[str] = field(default_factory=set, init=False)

    def run(self) -> None:
        """Respond to one message after another, until a command or the end of the input ends the chat."""
        messages: Iterable[str] = sys.stdin
        if self.terminal is not None:
            parameters = sum(weight.numel() for weight in self.chat.model.parameters())
            self.note(f"{parameters:,} parameters on {self.chat.device}; type help for commands, Ctrl-D to leave")
            messages = self.terminal.messages()
        if self.learning is not None:
            self._note_all(self.learning.start(self.chat))
        for message in messages:
            self._note_all(self.news())
            if self._handle(message.strip()):
                return

    def close(self) -> None:
        """End learning; the model and the conversation stay usable."""
        if self.learning is not None:
            self._note_all(self.learning.close())
            self.learning = None

    def news(self) -> list[str]:
        """Use the newest version; return a line about each event of learning since the last call."""
        return [] if self.learning is None else [without_controls(line) for line in self.learning.news()]

    def required_learning(self) -> LiveLearning:
        """What learns from this chat. Raises :class:`UserError` without --learn."""
        if self.learning is None:
            raise UserError("this chat does not learn: start it with rlchat chat --learn")
        return self.learning

    def versions(self) -> list[str]:
        """The versions of the model, as lines of a table."""
        from rlchat.chat.learning.live import table_of

        return table_of(self.chat.model_path) if self.learning is None else self.learning.table()

    def _note_all(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.note(line)

    def _handle(self, text: str) -> bool:
        """Run the command in ``text``, or respond to it; return True to end the chat.

        In a pipe, only a line with a leading slash is a command, because its lines may be arbitrary text.
        """
        try:
            if (found := commands.find(text, slash_only=self.terminal is None)) is not None:
                command, argument = found
                return bool(command.run(self, argument))
            if text:
                self.respond(text)
                self._note_all([] if self.terminal is None else commands.hint(text, self._hints))
        except OutputError:
            raise
        except UserError as error:
            self.note(str(error))
            self.failed = True
        except KeyboardInterrupt:
            if self.terminal is None:
                raise
            self.note("(stopped)")
        return False

    def respond(self, text: str) -> None:
        """Print the response to ``text`` as it is generated. Raises :class:`UserError` for an empty text.

        Ctrl-C stops the response; in a pipe, KeyboardInterrupt is raised again.
        """
        interactive = self.terminal is not None
        stopped = ""
        started = time.perf_counter()
        pieces = self.chat.stream_response(text, **self.sampling)
        try:
            if interactive:
                write_output("model> ")
            # Closed immediately, so that the text so far is in the history before the next message.
            with contextlib.closing(pieces):
                for piece in pieces:
                    write_output(without_controls(piece) if sys.stdout.isatty() else piece)
        except KeyboardInterrupt:
            if not interactive:
                print(flush=True)
                raise
            stopped = " (stopped)"
        self._seconds = time.perf_counter() - started
        write_output(stopped, end="\n")
        self._report_dropped()

    def respond_to_all(self, prompts: Sequence[Conversation], out: Path | None) -> None:
        """Write the responses to ``prompts`` as JSON to ``out``, or to standard output if that is None.

        The responses are written before they are scored, so that no error of a reward can lose them. Raises
        :class:`UserError` if ``out`` exists and there is no terminal to ask.
        """
        from rlchat.chat.batch import add_rewards, as_json, generate_rows
        from rlchat.models.sampling import Sampling

        def write(path: Path) -> None:
            write_atomically(path, lambda file: file.write(as_json(rows).encode("utf-8", errors="replace")))

        if out is not None and not self.may_write(out):
            self.note("not written")
            return
        rows, replies = generate_rows(self.chat, prompts, Sampling(**self.sampling))
        if out is not None:
            write(out)
        try:
            unscored = add_rewards(self.chat, prompts, replies, rows)
        finally:  # after Ctrl-C during scoring, the responses are still printed
            if out is None:
                write_output(as_json(rows))
        if out is not None:
            write(out)
        if self.chat.dropped_messages or self.chat.cut_tokens or self.chat.dropped_system:
            system = " and system messages" if self.chat.dropped_system else ""
            self.note(
                f"some prompts are too long for the model's context: {self.chat.dropped_messages} oldest messages, "
                f"{self.chat.cut_tokens} tokens{system} were left out"
            )
        if unscored:
            self.note(unscored)
        if out is not None:
            self.note(f"wrote {len(prompts)} responses to {out}")

    def _report_dropped(self) -> None:
        """Report which messages the model did not see; older messages only once, when the first is dropped."""
        if self.chat.cut_tokens:
            self.note(f"(message too long: the model did not see its first {self.chat.cut_tokens} tokens)")
        if self.chat.dropped_system:
            self.note("(the system message does not fit into the model's context and was left out)")
        if self.chat.dropped_messages and not self._reported_dropped:
            self.note("(the conversation exceeds the model's context: the oldest messages are left out)")
        self._reported_dropped = self.chat.dropped_messages > 0

    def note(self, text: str) -> None:
        """Print a text that is not a response: to standard error in a pipe."""
        print(without_controls(text), file=sys.stderr if self.terminal is None else sys.stdout, flush=True)

    def ask(self, question: str, default: str = "") -> str:
        """The user's answer to ``question``; empty in a pipe."""
        return "" if self.terminal is None else self.terminal.ask(question, default)

    def may_write(self, path: Path) -> bool:
        """Whether ``path`` may be written; asks before a file is overwritten.

        Raises :class:`UserError` for a directory, and for an existing file if there is no terminal to ask.
        """
        if path.is_dir():
            raise UserError(f"{path} is a directory: specify a file name")
        if self.force or not path.exists():
            return True
        if self.terminal is None:
            raise UserError(f"{path} exists: choose another name, or use --force")
        return self.ask(f"{path} exists; overwrite it? [y/N] ").strip().lower() in ("y", "yes")

    def add_feedback(self, verdict: Verdict) -> None:
        """Save a verdict on the last response."""
        saved = "saved" if self.chat.add_feedback(verdict, self.feedback) else "already saved"
        what = "corrected response" if isinstance(verdict, Correction) else f"{verdict} response"
        self.note(f"{saved} in {self.feedback}: {what}")
        if self.learning is not None:
            self.learning.notify()

    def settings(self) -> dict[str, Any]:
        """The sampling options, by the names in :data:`rlchat.chat.commands.SETTINGS`."""
        seed = "none" if self.chat.seed is None else self.chat.seed
        values = {**self.sampling, "seed": seed, "best_of": self.chat.best_of}
        return {name: values[name] for name in commands.SETTINGS}

    def set(self, name: str, value: str) -> None:
        """Change a setting for the responses that follow. Raises :class:`UserError` for an invalid name or value."""
        if name not in commands.SETTINGS:
            raise UserError(f"unknown setting {name!r}: expected one of {', '.join(commands.SETTINGS)}")
        number: float | None = None
        try:
            if (name, value.lower()) != ("seed", "none"):
                number = float(value) if name in ("temperature", "top_p") else int(value)
        except ValueError:
            kind = "a number" if name in ("temperature", "top_p") else "an integer"
            raise UserError(f"invalid value {value!r} for {name}: expected {kind}, as in: set {name} 1") from None
        self._change(name, number)

    def adopt(self, sampling: Mapping[str, Any]) -> None:
        """Change all settings in ``sampling``, except for values out of range, which are reported."""
        for name, value in sampling.items():
            try:
                self._change(name, value)
            except UserError as error:
                self.note(f"{name} stays {self.settings()[name]}: {error}")

    def _change(self, name: str, value: Any) -> None:
        from rlchat.chat.generation import sampling_from

        if name == "seed":
            self.chat.reseed(value)
        elif name == "best_of":
            self.chat.best_of = value
        else:
            self.sampling = asdict(sampling_from(**{**self.sampling, name: value}))

    def speed(self) -> str:
        """The speed of the last response. Raises :class:`UserError` if there is none."""
        if (turn := self.chat.last_turn) is None or not self._seconds:
            raise UserError("there is no response yet: send a message first")
        tokens = turn[1].tokens
        return f"{tokens} tokens in {self._seconds:.2f} s: {tokens / self._seconds:.0f} tokens per second"


def without_controls(text: str) -> str:
    """``text`` without control characters, with which a model could send commands to the terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
