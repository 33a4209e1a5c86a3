"""What is typed at `rlchat chat`'s prompt: several lines, completed commands, and a history that lasts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from rlchat.chat.commands import COMMANDS, SETTINGS


class Terminal:
    """The prompt. Enter sends, Alt-Enter begins another line, and a paste of several lines stays one message."""

    def __init__(self) -> None:
        self._session: PromptSession[str] = PromptSession(
            message=_styled("you> "),
            prompt_continuation=_styled("...> "),
            multiline=True,
            key_bindings=_keys(),
            history=_history(),
            completer=CommandCompleter(),
            complete_while_typing=Condition(lambda: self._session.default_buffer.text.startswith("/")),
            enable_suspend=True,
        )

    def messages(self) -> Iterator[str]:
        """What is typed, one message after the other, until Ctrl-D."""
        while True:
            try:
                message = self._session.prompt()
            except KeyboardInterrupt:
                print("(Ctrl-D or quit leaves)")
                continue
            except EOFError:
                return
            yield message

    def ask(self, question: str, default: str = "") -> str:
        """The answer to ``question``, which begins as ``default``; empty where Ctrl-C or Ctrl-D gives none."""
        session: PromptSession[str] = PromptSession(message=_styled(question), multiline=True, key_bindings=_keys())
        try:
            return session.prompt(default=default)
        except (KeyboardInterrupt, EOFError):
            return ""


class CommandCompleter(Completer):
    """The names of commands, and what follows them; while one types only behind a /, and else on the tab key."""

    def __init__(self) -> None:
        self._files = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """What may stand at the end of what is typed."""
        typed = document.text_before_cursor
        if "\n" in typed or not (typed.startswith("/") or complete_event.completion_requested):
            return
        word, space, argument = typed.removeprefix("/").partition(" ")
        if not space:
            for command in COMMANDS:
                for name in command.names:
                    if name.startswith(word.lower()):
                        yield Completion(name, -len(word), display_meta=command.what)
            return
        for command in COMMANDS:
            if word.lower() in command.names and command.completes == "settings":
                yield from (Completion(name, -len(argument)) for name in SETTINGS if name.startswith(argument))
            if word.lower() in command.names and command.completes == "files":
                yield from self._files.get_completions(Document(argument), complete_event)


class _LastingHistory(FileHistory):
    """A history that does without its file where that cannot be written any more."""

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            super().store_string(string)


def _history() -> History:
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "rlchat"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "chat_history"
        path.touch(0o600)  # what one says to a model is nobody else's business
        path.read_bytes()
    except OSError:
        return InMemoryHistory()
    return _LastingHistory(str(path))


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _begin_a_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _styled(text: str) -> FormattedText:
    return FormattedText([("bold ansicyan", text)])
