"""No folder of the server's machine reaches a client."""

from __future__ import annotations

from pathlib import Path, PureWindowsPath

import pytest

from rlchat.server.feedback.names import FileNames

HOME = "/home/anna"
NAMES = FileNames(
    [
        Path(HOME, "my models/chat.pt"),
        Path(HOME, "my secret feedback.jsonl"),
        Path(HOME, "x/feedback"),
        Path("/a+c.pt"),
    ],
    [Path(HOME, "my models/chat.versions")],
)


@pytest.mark.parametrize(
    ("sentence", "public"),
    [
        (f"{HOME}/my secret feedback.jsonl: cannot be read", "my secret feedback.jsonl: cannot be read"),
        (f"see {HOME}/x/feedback or /a+c.pt", "see feedback or a+c.pt"),
        (f"{HOME}/my models/chat.versions/learn.log", "learn.log"),
        (f"{HOME}/my models/chat.versions: cannot be written", "chat.versions: cannot be written"),
        (f"{HOME}/my models/chat.pt and {HOME}/my models/chat.versions/3.pt", "chat.pt and 3.pt"),
        ("there is no version 7; expected one of 0, 1", "there is no version 7; expected one of 0, 1"),
        ("the verdicts are on responses of <img src=x>.pt", "the verdicts are on responses of <img src=x>.pt"),
        (f"{HOME}/my models/chat.versions/.scratch/my file: full", "hidden"),
        (f"{HOME}/other secret.txt: not found", "hidden"),
        (f"{HOME}/x/feedback/secret", "hidden"),
        ("no such file: data/secret plans", "hidden"),
        (r"C:\\Users\Anna feed.jsonl: not found", "hidden"),
        ("'~/secret'", "hidden"),
    ],
)
def test_paths_become_names(sentence: str, public: str) -> None:
    assert NAMES.public(sentence, "hidden") == public


def test_relative_and_resolved_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real folder").mkdir()
    (tmp_path / "link").symlink_to("real folder")
    monkeypatch.chdir(tmp_path)
    names = FileNames([Path("link/feedback of anna")], [Path("chat.versions")])
    for folder in ("link", tmp_path / "link", tmp_path / "real folder"):
        assert names.public(f"{folder}/feedback of anna: full", "hidden") == "feedback of anna: full"
    assert names.public(f"{tmp_path}/chat.versions/1.pt", "hidden") == "1.pt"
    assert names.public("chat.versions: full", "hidden") == "chat.versions: full"


def test_paths_of_windows() -> None:
    names = FileNames([PureWindowsPath(r"C:\Users\Anna B\feed.jsonl")], [PureWindowsPath(r"D:\models\chat.versions")])
    assert names.public(r"C:\Users\Anna B\feed.jsonl: full", "hidden") == "feed.jsonl: full"
    assert names.public(r"D:\models\chat.versions\1.pt; C:/Users/Anna B/feed.jsonl", "hidden") == "1.pt; feed.jsonl"
    assert names.public(r"C:\Users\Anna C\feed.jsonl: full", "hidden") == "hidden"
    assert FileNames([]).public("nothing known", "hidden") == "nothing known"
