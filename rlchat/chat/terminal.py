"""The prompt of `rlchat chat` in a terminal: multi-line input, completion of commands, a persistent history."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app, run_in_terminal
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.styles import Style

from rlchat.chat.commands import COMMANDS

_LOOK_SECONDS = 0.5  # between two looks for news


class Terminal:
    """The prompt. Enter sends, Alt-Enter starts a new line, and pasted lines are one message.

    Args:
        news: returns new lines to be printed. They are printed before a prompt, or above one at which nothing is typed.
            None: there are none.
        toolbar: the text below the prompt; None: there is none.
    """

    def __init__(
        self, news: Callable[[], Sequence[str]] | None = None, toolbar: Callable[[], str] | None = None
    ) -> None:
        self._news = news
        self._lines: list[str] = []  # news that is not printed yet
        self._session: PromptSession[str] = PromptSession(
            message=_styled("you> "),
            prompt_continuation=_styled("...> "),
            multiline=True,
            key_bindings=_keys(),
            history=_history(),
            completer=CommandCompleter(),
            complete_while_typing=Condition(lambda: self._session.default_buffer.text.startswith("/")),
            enable_suspend=True,
            bottom_toolbar=toolbar,
            refresh_interval=0 if toolbar is None else _LOOK_SECONDS,
            style=Style.from_dict({"bottom-toolbar": "noreverse ansibrightblack"}),
        )

    def messages(self) -> Iterator[str]:
        """The messages that the user types, until Ctrl-D."""
        while True:
            self._look()
            self._print()
            try:
                message = self._session.prompt(pre_run=None if self._news is None else self._watch)
            except KeyboardInterrupt:
                print("(to leave, press Ctrl-D or type quit)")
                continue
            except EOFError:
                return
            self._print()
            yield message

    def _watch(self) -> None:
        """Look for news while nothing is typed."""
        app = get_app()

        async def look() -> None:
            while True:
                await asyncio.sleep(_LOOK_SECONDS)
                if not app.current_buffer.text:
                    self._look()
                if self._lines:  # typing may begin now; the prompt is drawn again, with all that is typed
                    await run_in_terminal(self._print)

        app.create_background_task(look())

    def _look(self) -> None:
        if self._news is not None:
            self._lines += self._news()

    def _print(self) -> None:
        while self._lines:
            print(self._lines.pop(0), flush=True)

    def ask(self, question: str, default: str = "") -> str:
        """The user's answer to ``question``, prefilled with ``default``; empty after Ctrl-C or Ctrl-D."""
        session: PromptSession[str] = PromptSession(message=_styled(question), multiline=True, key_bindings=_keys())
        try:
            return session.prompt(default=default)
        except (KeyboardInterrupt, EOFError):
            return ""


class CommandCompleter(Completer):
    """Completes commands and their arguments: while typing after a slash, otherwise on the tab key."""

    def __init__(self) -> None:
        self._files = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """Completions at the end of the typed text."""
        typed = document.text_before_cursor
        if "\n" in typed or not (typed.startswith("/") or complete_event.completion_requested):
            return
        word, space, argument = typed.removeprefix("/").partition(" ")
        if not space:
            for command in COMMANDS:
                for name in command.names:
                    if name.startswith(word.lower()):
                        yield Completion(name, -len(word), display_meta=command.help)
            return
        for command in COMMANDS:
            if word.lower() in command.names and command.completes == "files":
                yield from self._files.get_completions(Document(argument), complete_event)
            elif word.lower() in command.names:
                yield from (Completion(one, -len(argument)) for one in command.completes if one.startswith(argument))


class _FileHistory(FileHistory):
    """A history that ignores errors when its file cannot be written."""

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            super().store_string(string)


def _history() -> History:
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "rlchat"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "chat_history"
        path.touch(0o600)  # private: readable by the user only
        path.read_bytes()
    except OSError:
        return InMemoryHistory()
    return _FileHistory(str(path))


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _styled(text: str) -> FormattedText:
    return FormattedText([("bold ansicyan", text)])
