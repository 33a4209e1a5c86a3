"""The commands of `rlchat chat`. One registry drives dispatch, completion and help.

To add a command, write a function here and decorate it with :func:`command`; nothing else needs to change.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rlchat.chat.feedback import Correction
from rlchat.errors import UserError, counted

if TYPE_CHECKING:
    from rlchat.chat.repl import Session

SETTINGS = ("temperature", "max_new_tokens", "top_p", "top_k", "seed", "best_of")

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"

Run = Callable[["Session", str], bool | None]


@dataclass(frozen=True, slots=True)
class Command:
    """One command and its names.

    ``run`` takes the session and the text after the name, and returns True to end the chat. ``argument`` is the
    argument as shown in help. ``arguments`` is a pattern of the arguments with which a line is a command without a
    leading slash; with any other argument, the line is a message. ``completes`` has the words that may follow the name.
    """

    names: tuple[str, ...]
    help: str
    run: Run
    argument: str = ""
    arguments: str = ""
    completes: Literal["files"] | tuple[str, ...] = ()

    @property
    def usage(self) -> str:
        """Names and argument, for the help."""
        return f"{', '.join(self.names)} {self.argument}".rstrip()


COMMANDS: list[Command] = []


def command(
    *names: str,
    help: str,
    argument: str = "",
    arguments: str = "",
    completes: Literal["files"] | tuple[str, ...] = (),
) -> Callable[[Run], Run]:
    """Register the decorated function as a command; see :class:`Command`."""

    def register(run: Run) -> Run:
        COMMANDS.append(Command(names, help, run, argument, arguments, completes))
        return run

    return register


def find(line: str, *, slash_only: bool = False) -> tuple[Command, str] | None:
    """The command in ``line`` and its argument; None for a message.

    With ``slash_only``, a line without a leading slash is always a message, as in a pipe. Raises :class:`UserError` for
    a slash and a word that is not a command.
    """
    slash = line.startswith("/")
    if slash_only and not slash:
        return None
    word, _, argument = line.removeprefix("/").partition(" ")
    argument = argument.strip()
    for known in COMMANDS:
        if word.lower() in known.names:
            if not argument or re.fullmatch(known.arguments, argument, re.IGNORECASE):
                return known, argument
            if slash and known.argument:
                return known, argument
    if slash and re.match(r"/[^\W\d_]+(?!\S)", line):
        names = [name for known in COMMANDS for name in known.names]
        (nearest,) = difflib.get_close_matches(word.lower(), names, n=1, cutoff=0.0)
        raise UserError(f"unknown command {line.splitlines()[0]}: did you mean /{nearest}? /help lists all commands")
    return None


def hint(line: str, given: set[str]) -> list[str]:
    """A line about a message that begins like a command with an argument, once for each command.

    ``given`` has the commands with a hint so far.
    """
    word, space, _ = line.partition(" ")
    for known in COMMANDS:
        if space and known.argument and word.lower() in known.names and word.lower() not in given:
            given.add(word.lower())
            return [f"(sent as a message; for the command, type undo, and then /{known.usage})"]
    return []


@command("quit", "exit", "bye", help="leave")
def _quit(session: Session, _: str) -> bool:
    return True


@command("help", help="show this help")
def _help(session: Session, _: str) -> None:
    width = max(len(known.usage) for known in COMMANDS)
    session.note("Type a message, or one of these commands, with or without a leading slash:")
    for known in COMMANDS:
        session.note(f"  {known.usage:<{width}}  {known.help}")
    session.note("A slash is required in a pipe, for a file name with spaces, and for edit with a text.")
    session.note("To send one of these words as a message, end it with a period.")
    session.note("Ctrl-C stops a response. Ctrl-D leaves. Alt-Enter starts a new line.")


@command("clear", help="delete the conversation; the system message stays")
def _clear(session: Session, _: str) -> None:
    session.chat.clear()
    session.note("conversation cleared")


@command("undo", help="remove your last message and its response")
def _undo(session: Session, _: str) -> None:
    text = session.chat.undo()
    session.note("nothing to undo" if text is None else f"removed: {_short(text)}")


@command("retry", help="generate another response to your last message")
def _retry(session: Session, _: str) -> None:
    if (text := session.chat.undo()) is None:
        raise UserError("there is no message yet: send one first")
    session.respond(text)
    session.chat.redo()  # restores the old response if Ctrl-C came before the first character


@command("history", help="show the conversation")
def _history(session: Session, _: str) -> None:
    if session.chat.system is not None:
        session.note(f"system> {session.chat.system}")
    for message in session.chat.history:
        session.note(f"{'you' if message.role == 'user' else 'model'}> {message.text}")
    if not session.chat.history:
        session.note("the conversation is empty")


@command("save", help="save the conversation to a file", argument="<filename>", arguments=r"\S+", completes="files")
def _save(session: Session, name: str) -> None:
    path = Path(_required(name, "a file name", "/save chat.json")).expanduser()
    if not session.may_write(path):
        session.note("not saved")
        return
    session.chat.save(path, overwrite=True)
    session.note(f"saved {counted(len(session.chat.history), 'message')} to {path}")


@command("load", help="load a conversation from a file", argument="<filename>", arguments=r"\S+", completes="files")
def _load(session: Session, name: str) -> None:
    saved = session.chat.load(_required(name, "a file name", "/load chat.json"))
    model = f" (model: {saved.model})" if saved.model else ""
    session.note(f"loaded {counted(len(session.chat.history), 'message')} from {name}{model}")
    if session.chat.system is not None:
        session.note(f"system message: {session.chat.system}")
    if saved.sampling:
        session.adopt(saved.sampling)
        session.note(f"settings: {_settings(session)}")


@command("system", help="set the system message (none: remove it); alone, show it", argument="<text>", arguments=r".+")
def _system(session: Session, text: str) -> None:
    if text:
        session.chat.system = None if text.lower() == "none" else text
    system = session.chat.system
    session.note("no system message: set one with system <text>" if system is None else f"system message: {system}")


@command(
    "set",
    help=f"set {', '.join(SETTINGS)}; alone, show them",
    argument="<name> <value>",
    arguments=rf"(?:{'|'.join(SETTINGS)})(?:[\s=].*)?|\S+ +{_NUMBER}",
    completes=SETTINGS,
)
def _set(session: Session, argument: str) -> None:
    if argument:
        name, *value = re.split(r"[\s=]+", argument, maxsplit=1)
        session.set(name.lower(), "".join(value))
    session.note(_settings(session))


@command("good", help="rate the last response as good; saved as training data")
def _good(session: Session, _: str) -> None:
    session.add_feedback("good")


@command("bad", help="rate the last response as bad")
def _bad(session: Session, _: str) -> None:
    session.add_feedback("bad")


@command("edit", help="correct the last response", argument="<text>")
def _edit(session: Session, text: str) -> None:
    turn = session.chat.last_turn
    if not text and turn is not None and session.terminal is not None:
        text = session.ask("corrected response> ", turn[1].text)
        if not text.strip():
            session.note("not saved")
            return
    session.add_feedback(Correction(_required(text, "a response", "/edit Anna lives in Rome.")))


@command("versions", help="list the versions that were learned from feedback")
def _versions(session: Session, _: str) -> None:
    for line in session.versions():
        session.note(line)


@command(
    "rollback",
    help="use an earlier version again (0: the original); alone, the one before",
    argument="<number>",
    arguments=r"\d+",
)
def _rollback(session: Session, number: str) -> None:
    learning = session.required_learning()
    if number and not (number.isdecimal() and number.isascii()):
        raise UserError(f"invalid version {number!r}: expected a number, as in: rollback 1")
    session.note(learning.rollback(int(number) if number else None))


@command(
    "learning",
    help="turn learning from feedback on or off; alone, show where it stands",
    argument="on|off",
    arguments="on|off",
    completes=("on", "off"),
)
def _learning(session: Session, switch: str) -> None:
    learning = session.required_learning()
    if switch and switch.lower() not in ("on", "off"):
        raise UserError(f"invalid value {switch!r} for learning: expected on or off")
    session.note(learning.set_learning(switch.lower() == "on") if switch else learning.describe())


@command("reward", help="show the reward of the last response, its factors and the critic's value")
def _reward(session: Session, _: str) -> None:
    factors, value = session.chat.score_last_response()
    width = max(map(len, ("reward", *factors)))
    session.note(f"  {'reward':<{width}}  {sum(factors.values()):+.3f}")
    for name, contribution in factors.items():
        session.note(f"  {name:<{width}}  {contribution:+.3f}")
    turn = session.chat.last_turn
    assert turn is not None  # it has just been scored
    for name, why in session.chat.last_reward.not_scored(turn[0]).items():
        session.note(f"  not included: {name} ({why})")
    session.note("  no trained critic" if value is None else f"  critic's value of the prompt: {value:+.3f}")


@command("speed", help="show the speed of the last response in tokens per second")
def _speed(session: Session, _: str) -> None:
    session.note(session.speed())


@command("test", help="check that texts survive encoding and decoding")
def _test(session: Session, _: str) -> None:
    checks = session.chat.tokenization_test()
    for check in checks:
        session.note(f"  {'ok    ' if check.intact else 'BROKEN'} {check.tokens:>5} tokens  {_short(check.text)!r}")
    intact = sum(check.intact for check in checks)
    session.note(f"{intact} of {len(checks)} texts intact with the encoding {session.chat.tokenizer.name}")


def _settings(session: Session) -> str:
    return ", ".join(f"{name} {value}" for name, value in session.settings().items())


def _required(argument: str, what: str, example: str) -> str:
    if not argument.strip():
        raise UserError(f"this command needs {what}, for example: {example}")
    return argument


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:59] + "…"
