"""Which lines are commands and which are messages; dispatch, help and completion use one registry."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from rlchat.chat.commands import COMMANDS, SETTINGS, find, hint
from rlchat.chat.repl import Session
from rlchat.chat.terminal import CommandCompleter
from rlchat.errors import UserError

NAMES = [name for command in COMMANDS for name in command.names]


def test_names_of_all_commands() -> None:
    promised = "quit exit bye clear save test help load system set history undo retry reward good bad edit speed"
    learning = "versions rollback learning"
    assert sorted(NAMES) == sorted([*promised.split(), *learning.split()])
    assert set(SETTINGS) == {"temperature", "max_new_tokens", "top_p", "top_k", "seed", "best_of"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spelling", ["{}", "/{}", "{} "])
def test_a_command_is_the_whole_line(name: str, spelling: str) -> None:
    for word in (name, name.upper(), name.title()):
        found = find(spelling.format(word))
        assert found is not None
        assert name in found[0].names
        assert found[1] == ""


@pytest.mark.parametrize(
    ("line", "name", "argument"),
    [
        ("save talk.json", "save", "talk.json"),
        ("save mytalk", "save", "mytalk"),
        ("load ~/talks/a.json", "load", "~/talks/a.json"),
        ("load b", "load", "b"),
        ("/save my talk", "save", "my talk"),
        ("system You are a pirate.", "system", "You are a pirate."),
        ("/system You are\na pirate.", "system", "You are\na pirate."),
        ("set temperature 0.5", "set", "temperature 0.5"),
        ("SET Top_K  5", "set", "Top_K  5"),
        ("set top_p -1e-3", "set", "top_p -1e-3"),
        ("set seed none", "set", "seed none"),
        ("set temperature=0", "set", "temperature=0"),
        ("set temperature hot", "set", "temperature hot"),
        ("set temperature 1 2", "set", "temperature 1 2"),
        ("set seed", "set", "seed"),
        ("set foo 3", "set", "foo 3"),
        ("/set whatever", "set", "whatever"),
        ("/edit Anna lives in Rome.", "edit", "Anna lives in Rome."),
        ("rollback 12", "rollback", "12"),
        ("/rollback one", "rollback", "one"),
        ("learning OFF", "learning", "OFF"),
    ],
)
def test_arguments_of_commands(line: str, name: str, argument: str) -> None:
    found = find(line)
    assert found is not None
    assert (found[0].names[0], found[1]) == (name, argument)


@pytest.mark.parametrize(
    "line",
    [
        *("test.", "good idea", "bad news?", "reward me", "history of Rome", "help me", "quit smoking", "undo it"),
        *("save me from this", "save the whales.json please", "load it up", "systematic errors"),
        *("rollback one", "rollback the law", "learning French", "versions of it", "learning on it"),
        *("edit this essay, please", "set the table please", "set theory", "set seeds apart", "set the clock 3 h"),
        *("/", "/2", "/etc/passwd", "1/2", "// clear", "clear\nthe table", "system a\nb", ""),
    ],
)
def test_other_lines_are_messages(line: str) -> None:
    assert find(line) is None


@pytest.mark.parametrize(
    ("line", "nearest"), [("/claer", "clear"), ("/rewrad x", "reward"), ("/clear now", "clear"), ("/Hlep", "help")]
)
def test_an_unknown_command_names_the_nearest(line: str, nearest: str) -> None:
    with pytest.raises(
        UserError, match=rf"^unknown command {line}: did you mean /{nearest}\? /help lists all commands$"
    ):
        find(line)


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    found = find("help")
    assert found is not None
    found[0].run(Session(None, {}), "")  # type: ignore[arg-type]  # help needs no chat
    said = capsys.readouterr().err
    for command in COMMANDS:
        pattern = rf"^  {', '.join(command.names)}(?: {re.escape(command.argument)})? +{re.escape(command.help)}$"
        assert re.search(pattern, said, re.MULTILINE), command.names
    assert max(map(len, said.splitlines())) <= 110


def completions(typed: str, on_tab: bool = True) -> list[str]:
    event = CompleteEvent(text_inserted=not on_tab, completion_requested=on_tab)
    return [c.text for c in CommandCompleter().get_completions(Document(typed), event)]


def test_completion_offers_every_command() -> None:
    assert completions("/", on_tab=False) == NAMES
    assert completions("") == NAMES
    assert completions("/re") == ["retry", "reward"]
    assert completions("UN") == ["undo"]
    assert completions("h", on_tab=False) == []  # while one writes a message, nothing jumps up
    assert completions("set ") == list(SETTINGS)
    assert completions("/set top_") == ["top_p", "top_k"]
    assert completions("learning o") == ["on", "off"]
    assert completions("clear ") == []
    assert completions("Hello\nre") == []


def test_completion_of_files(workplace: Path) -> None:
    (workplace / "talk.json").touch()
    assert completions("save ta") == ["lk.json"]
    assert completions("/load ./t") == ["alk.json"]


def test_the_registry_needs_no_model() -> None:
    program = (
        "import sys, rlchat.chat.commands, rlchat.chat.repl; "
        "print('torch' in sys.modules, 'prompt_toolkit' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "False False\n"


def test_a_message_that_begins_like_a_command_gets_a_hint_once() -> None:
    given: set[str] = set()
    assert hint("edit Anna lives in Rome.", given) == [
        "(sent as a message; for the command, type undo, and then /edit <text>)"
    ]
    assert hint("Edit it again", given) == []
    assert hint("learning status", given) == [
        "(sent as a message; for the command, type undo, and then /learning on|off)"
    ]
    for line in ("good morning", "edit", "edited text", "What is an edit text?", "help me"):
        assert hint(line, set()) == []
