"""The commands of `rlchat chat`: one registry, which drives what they do, their help and their completion."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rlchat.chat.feedback import Correction
from rlchat.errors import UserError

if TYPE_CHECKING:
    from rlchat.chat.repl import Talk

SETTINGS = ("temperature", "max_new_tokens", "top_p", "top_k", "seed")

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"


@dataclass(frozen=True, slots=True)
class Command:
    """Words that are not for the model.

    ``run`` takes what follows the name, and returns True where the talk is over. ``arguments`` is a pattern for the
    arguments that make a line a command though no / stands before it; whatever else follows the name is a message.
    ``completes`` says what a tab offers after the name.
    """

    names: tuple[str, ...]
    what: str
    run: Callable[[Talk, str], bool | None]
    argument: str = ""  # as the help names it
    arguments: str = ""
    completes: Literal["nothing", "files", "settings"] = "nothing"

    @property
    def usage(self) -> str:
        """How to type it."""
        return f"{', '.join(self.names)} {self.argument}".rstrip()


def find(line: str) -> tuple[Command, str] | None:
    """The command that ``line`` is, and its argument; None for a message.

    Raises :class:`UserError` for a line that begins with a / and a word as commands do, and is none.
    """
    slash = line.startswith("/")
    word, _, argument = line.removeprefix("/").partition(" ")
    argument = argument.strip()
    for command in COMMANDS:
        if word.lower() in command.names:
            if not argument or re.fullmatch(command.arguments, argument, re.IGNORECASE):
                return command, argument
            if slash and command.argument:
                return command, argument
    if slash and re.match(r"/[^\W\d_]+(?!\S)", line):
        known = [name for command in COMMANDS for name in command.names]
        (nearest,) = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.0)
        raise UserError(f"no command {line.splitlines()[0]}; did you mean {nearest}? help lists them all")
    return None


def _leave(talk: Talk, _: str) -> bool:
    return True


def _help(talk: Talk, _: str) -> None:
    width = max(len(command.usage) for command in COMMANDS)
    talk.note("All that you type is a message, but for these words as a whole line, with or without a / before them:")
    for command in COMMANDS:
        talk.note(f"  {command.usage:<{width}}  {command.what}")
    talk.note("A filename without a / before its command is one word, and edit with a text needs the /.")
    talk.note("To say one of these words to the model, add a full stop to it. Ctrl-C stops a reply, Ctrl-D leaves;")
    talk.note("Alt-Enter begins another line, and what is pasted stays one message.")


def _clear(talk: Talk, _: str) -> None:
    talk.chat.clear()
    talk.note("the conversation is forgotten")


def _save(talk: Talk, name: str) -> None:
    path = Path(_given(name, "a file", "save talk.json")).expanduser()
    if not talk.may_write(path):
        talk.note("nothing was saved")
        return
    talk.chat.save(path, overwrite=True)
    talk.note(f"saved {_count(len(talk.chat.history), 'message')} to {path}")


def _load(talk: Talk, name: str) -> None:
    saved = talk.chat.load(_given(name, "a file", "load talk.json"))
    by = f", last with {saved.model}" if saved.model else ""
    talk.note(f"going on from {_count(len(talk.chat.history), 'message')} in {name}{by}")
    if talk.chat.system is not None:
        talk.note(f"the system message is: {talk.chat.system}")
    if saved.sampling:
        talk.adopt(saved.sampling)
        talk.note(f"sampling from now on: {_settings(talk)}")


def _system(talk: Talk, text: str) -> None:
    if text:
        talk.chat.system = None if text.lower() == "none" else text
    now = talk.chat.system
    talk.note("there is no system message; system <text> gives one" if now is None else f"the system message is: {now}")


def _set(talk: Talk, words: str) -> None:
    if words:
        name, *value = re.split(r"[\s=]+", words, maxsplit=1)
        talk.set(name.lower(), "".join(value))
    talk.note(_settings(talk))


def _history(talk: Talk, _: str) -> None:
    if talk.chat.system is not None:
        talk.note(f"system> {talk.chat.system}")
    for message in talk.chat.history:
        talk.note(f"{'you' if message.role == 'user' else 'model'}> {message.text}")
    if not talk.chat.history:
        talk.note("nothing was said yet")


def _undo(talk: Talk, _: str) -> None:
    text = talk.chat.undo()
    talk.note("nothing was said yet" if text is None else f"taken back: {_short(text)}")


def _retry(talk: Talk, _: str) -> None:
    if (text := talk.chat.undo()) is None:
        raise UserError("nothing was said yet; say something first")
    talk.say(text)
    talk.chat.redo()  # where Ctrl-C came before the first word, the old reply stands


def _test(talk: Talk, _: str) -> None:
    checks = talk.chat.tokenization_test()
    for check in checks:
        talk.note(f"  {'ok    ' if check.intact else 'BROKEN'} {check.tokens:>5} tokens  {_short(check.text)!r}")
    broken = sum(not check.intact for check in checks)
    name = talk.chat.tokenizer.name
    talk.note(f"{len(checks) - broken} of {len(checks)} texts came back whole through the encoding {name}")


def _reward(talk: Talk, _: str) -> None:
    factors, value = talk.chat.judgement()
    width = max(map(len, ("reward", *factors)))
    talk.note(f"  {'reward':<{width}}  {sum(factors.values()):+.3f}")
    for name, contribution in factors.items():
        talk.note(f"  {name:<{width}}  {contribution:+.3f}")
    if talk.chat.reward.left_out:
        talk.note(f"  and without {', '.join(talk.chat.reward.left_out)}, which is not part of rlchat")
    expected = "the bundle has no trained critic" if value is None else f"the critic expected {value:+.3f}"
    talk.note(f"  {expected}{' before the first word' if value is not None else ''}")


def _speed(talk: Talk, _: str) -> None:
    talk.note(talk.speed())


def _good(talk: Talk, _: str) -> None:
    talk.judge("good")


def _bad(talk: Talk, _: str) -> None:
    talk.judge("bad")


def _edit(talk: Talk, text: str) -> None:
    turn = talk.chat.last_turn
    if not text and turn is not None and talk.terminal is not None:
        text = talk.ask("the reply should be> ", turn[1].text)
        if not text.strip():
            talk.note("nothing was kept")
            return
    talk.judge(Correction(_given(text, "the reply that it should be", "/edit Anna lives in Rome.")))


COMMANDS: Sequence[Command] = (
    Command(("quit", "exit", "bye"), "leave", _leave),
    Command(("help",), "show this", _help),
    Command(("clear",), "forget the conversation and begin anew; the system message stays", _clear),
    Command(("undo",), "take back your last message and the reply", _undo),
    Command(("retry",), "ask for another reply to your last message", _retry),
    Command(("history",), "show the conversation", _history),
    Command(("save",), "keep the conversation in a file", _save, "<filename>", r"\S+", "files"),
    Command(("load",), "go on from a conversation in a file", _load, "<filename>", r"\S+", "files"),
    Command(("system",), "tell the model how to be (none: nothing); alone, show it", _system, "<text>", r".+"),
    Command(
        ("set",),
        f"{'|'.join(SETTINGS)}; alone, show them",
        _set,
        "<name> <value>",
        rf"(?:{'|'.join(SETTINGS)})(?:[\s=].*)?|\S+ +{_NUMBER}",
        "settings",
    ),
    Command(("good",), "keep the last reply as training data: a good one", _good),
    Command(("bad",), "the same: a bad one", _bad),
    Command(("edit",), "the same, with the reply that it should have been", _edit, "<text>"),
    Command(("reward",), "the last reply's reward and its factors, and what the critic expected", _reward),
    Command(("speed",), "how fast the last reply came, in tokens per second", _speed),
    Command(("test",), "send texts of many kinds through the tokenizer and back", _test),
)


def _settings(talk: Talk) -> str:
    return ", ".join(f"{name} {value}" for name, value in talk.settings().items())


def _given(argument: str, what: str, example: str) -> str:
    if not argument.strip():
        raise UserError(f"this needs {what}; type, for instance, {example}")
    return argument


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:59] + "…"
