"""Conversation files: saving and loading, the older layout, OpenAI's layout, damaged files."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from helpers.full_disk import largest_file
from hypothesis import given
from hypothesis import strategies as st

from rlchat.chat import saved as conversation_files
from rlchat.chat.saved import (
    SavedConversation,
    SavedMessage,
    conversation_from_dict,
    conversation_to_dict,
    load_conversation,
    save_conversation,
)
from rlchat.errors import UserError

TALK = SavedConversation(
    (
        SavedMessage("system", "Be brief."),
        SavedMessage("user", "Hello 👩‍👩‍👧 é\n<|end|>", "2026-11-24T09:00:00+00:00"),
        SavedMessage("assistant", "", "2026-11-24T09:00:02+00:00"),
    ),
    "rl.pt",
    {"max_new_tokens": 100, "temperature": 0.7, "top_k": 0, "top_p": 1.0, "seed": None},
)
ROW = {"role": "user", "content": "a"}


def file(**parts: Any) -> dict[str, Any]:
    """The plain values of a file with one message, changed."""
    return {"format": "rlchat-conversation", "version": 1, "messages": [ROW], **parts}


def test_a_saved_conversation_is_loaded_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "new" / "talk.json"
    save_conversation(path, TALK)
    assert load_conversation(path) == TALK
    assert conversation_from_dict(conversation_to_dict(TALK), "it") == TALK


def test_the_layout_is_as_documented(tmp_path: Path) -> None:
    example = (conversation_files.__doc__ or "").split("::\n\n")[1].split("\n\nA system")[0]
    loaded = conversation_from_dict(json.loads(example), "the docstring")
    assert conversation_to_dict(loaded) == json.loads(example)
    assert [message.text for message in loaded.messages] == ["Hello", "Hi there!"]


def test_an_existing_file_is_kept_unless_allowed(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_text("mine")
    with pytest.raises(UserError, match=r"talk\.json exists: choose another name"):
        save_conversation(path, TALK)
    assert path.read_text() == "mine"
    save_conversation(path, TALK, overwrite=True)
    assert load_conversation(path) == TALK


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_text("mine")
    with (
        largest_file(100),
        pytest.raises(UserError, match=r"cannot be written: File too large; the existing file is unchanged"),
    ):
        save_conversation(path, TALK, overwrite=True)
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


def test_characters_that_utf8_cannot_encode_are_replaced(tmp_path: Path) -> None:
    save_conversation(tmp_path / "a.json", SavedConversation((SavedMessage("user", "a\ud800b"),)))
    assert load_conversation(tmp_path / "a.json").messages == (SavedMessage("user", "a?b"),)


def test_the_older_layout() -> None:
    content = {
        "conversation_history": [
            {"user": "Hello", "assistant": "Hi!", "timestamp": "2024-05-01 12:00:00"},
            {"user": "Bye", "assistant": "Bye!", "timestamp": 0},
            {"user": "?", "assistant": "!"},
        ]
    }
    first, second, third = "2024-05-01 12:00:00", "1970-01-01T00:00:00+00:00", None
    assert conversation_from_dict(content, "it") == SavedConversation(
        (
            SavedMessage("user", "Hello", first),
            SavedMessage("assistant", "Hi!", first),
            SavedMessage("user", "Bye", second),
            SavedMessage("assistant", "Bye!", second),
            SavedMessage("user", "?", third),
            SavedMessage("assistant", "!", third),
        )
    )


def test_the_layout_of_openai() -> None:
    parts = [{"type": "text", "text": "Who are "}, {"type": "text", "text": "you?"}]
    content = {"messages": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]}
    expected = SavedConversation((SavedMessage("system", "Be brief."), SavedMessage("user", "Who are you?")))
    assert conversation_from_dict(content, "it") == expected
    picture = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}
    with pytest.raises(UserError, match="a part of the content of message 1 is None: expected text"):
        conversation_from_dict(picture, "it")


def test_optional_and_unknown_keys() -> None:
    loaded = conversation_from_dict(file(title="Anna", sampling={"temperature": 1, "min_p": 0.1}), "it")
    assert loaded == SavedConversation((SavedMessage("user", "a"),), "", {"temperature": 1})


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ([], "it is not a JSON object"),
        (None, "it is not a JSON object"),
        ({"format": "other", "messages": [ROW]}, "its format is neither rlchat's nor OpenAI's"),
        ({"format": None}, "its format is neither"),
        (file(version=2), "its version is 2: expected 1"),
        (file(messages={}), "messages is {}: expected a list"),
        (file(messages=["a"]), "message 1 is 'a': expected an object"),
        (file(messages=[ROW, {**ROW, "role": "god"}]), "the role of message 2 is 'god': expected one of system, user"),
        (file(messages=[{**ROW, "role": []}]), r"the role of message 1 is \[\]: expected one of"),
        (file(messages=[{**ROW, "content": None}]), "the content of message 1 is None: expected text"),
        (file(messages=[{**ROW, "time": []}]), r"time is \[\]: expected a time"),
        (file(messages=[{**ROW, "time": 1e30}]), "time is 1e\\+30: expected a time"),
        (file(messages=[ROW, {**ROW, "role": "system"}]), "a system message is not the first message"),
        (file(model=3), "model is 3: expected a string"),
        (file(sampling=[]), r"sampling is \[\]: expected an object"),
        (file(sampling={"temperature": "warm"}), "sampling.temperature is 'warm': expected a number"),
        (file(sampling={"top_p": float("nan")}), "sampling.top_p is nan: expected a number"),
        (file(sampling={"seed": True}), "sampling.seed is True: expected a number"),
        (file(sampling={"max_new_tokens": 1.5}), "sampling.max_new_tokens is 1.5: expected a number"),
        ({"conversation_history": {}}, "conversation_history is {}: expected a list"),
        ({"conversation_history": ["a"]}, "turn 1 is 'a': expected an object"),
        ({"conversation_history": [{"user": "a"}]}, "assistant of turn 1 is None: expected text"),
    ],
)
def test_a_damaged_file_is_a_user_error(content: object, why: str, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"talk\.json cannot be loaded: {why}.*$") as caught:
        load_conversation(path)
    assert "\n" not in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NEARLY = st.fixed_dictionaries(
    {"format": st.just("rlchat-conversation"), "version": st.just(1)},
    optional={
        "messages": JSON
        | st.lists(
            JSON
            | st.fixed_dictionaries(
                {"role": st.sampled_from(["user", "assistant", "system"]), "content": st.text(max_size=3) | JSON},
                optional={"time": JSON},
            ),
            max_size=3,
        ),
        "model": JSON,
        "sampling": JSON | st.dictionaries(st.sampled_from(["temperature", "seed", "top_k"]), JSON),
        "conversation_history": JSON,
    },
)


@given(content=JSON | NEARLY)
def test_any_content_is_a_conversation_or_a_user_error(content: Any) -> None:
    with contextlib.suppress(UserError):
        loaded = conversation_from_dict(content, "it")
        assert conversation_from_dict(conversation_to_dict(loaded), "it") == loaded


@pytest.mark.parametrize("content", [b"", b"{", b"\x80\x04\x95", b"[" * 100_000, b'{"a": "\xff"}'])
def test_a_file_that_is_not_json(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "talk.json").write_bytes(content)
    with pytest.raises(UserError, match=r"talk\.json is not a conversation file: it is not valid JSON"):
        load_conversation(tmp_path / "talk.json")


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"nope\.json: file not found"):
        load_conversation(tmp_path / "nope.json")
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path, tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(UserError, match=f"^{place} is a directory, a pipe or a device: expected a file$"):
            load_conversation(place)
    with pytest.raises(UserError, match="invalid file name"):
        load_conversation("a\0b")
    with pytest.raises(UserError, match="invalid file name"):
        save_conversation("a\0b", TALK)
    (tmp_path / "large.json").write_bytes(b" " * 11)
    monkeypatch.setattr(conversation_files, "MAX_BYTES", 10)
    with pytest.raises(UserError, match="expected at most 10 bytes"):
        load_conversation(tmp_path / "large.json")
