"""`rlchat chat --prompts FILE`: a file of prompts as input, JSON as output."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from helpers.chat_models import chain, random_policy, scripted_policy

from rlchat.__main__ import main
from rlchat.chat.interface import ChatInterface
from rlchat.models.model_file import save_bundle
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

REPLY = "Helo wrd"


@pytest.fixture(autouse=True)
def _models(workplace: Path, byte_tokenizer: ChatTokenizer) -> None:
    """Two models where the test works: one that always says REPLY and knows its reward, and one that says anything."""
    polite = scripted_policy(byte_tokenizer, chain(byte_tokenizer, list(REPLY.encode())))
    factor = {"class_path": "rlchat.rewards.TooShort", "init_args": {"min_words": 4}}
    polite.about["reward"] = [factor, {"class_path": "rlchat.rewards.MissingEnd"}]
    save_bundle("polite.pt", polite)
    save_bundle("random.pt", random_policy(byte_tokenizer))


def rows(*words: str, code: int = 0) -> list[dict[str, Any]]:
    assert main(["chat", *words, "--out", "out.json"]) == code
    found = json.loads(Path("out.json").read_text())
    assert isinstance(found, list)
    return found


def test_lines_of_text(capsys: pytest.CaptureFixture[str]) -> None:
    Path("asked.txt").write_text("Hello\n\n  Who are you? 🙂\nclear\n")
    found = rows("polite.pt", "--prompts", "asked.txt", "--temperature", "0.5", "--seed", "3", "--top_k", "4")
    assert [row["prompt"] for row in found] == ["Hello", "Who are you? 🙂", "clear"]
    for row in found:
        assert datetime.fromisoformat(row.pop("time")).tzinfo is not None
        assert row == {
            "prompt": row["prompt"],
            "reply": REPLY,
            "tokens": 9,
            "ended": True,
            "reward": -0.5,  # two words of four
            "factors": {"too_short": -0.5, "missing_end": 0.0},
            "model": "polite.pt",
            "sampling": {"max_new_tokens": 100, "temperature": 0.5, "top_k": 4, "top_p": 1.0, "seed": 3},
        }
    assert capsys.readouterr() == ("", "wrote 3 responses to out.json\n")


def test_rows_of_jsonl_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    talk = [{"role": "system", "content": "S"}, {"role": "user", "content": "a"}]
    lines = [{"prompt": "Hello"}, {"messages": talk}]
    Path("asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["chat", "--prompts", "asked.jsonl", "random.pt", "--temperature", "0", "--max_new_tokens", "5"]) == 0
    out, err = capsys.readouterr()
    first, second = json.loads(out)
    assert err == ""
    assert "messages" not in first
    assert "reward" not in first  # the bundle carries none
    assert (second["prompt"], second["messages"]) == ("a", talk)
    chat = ChatInterface("random.pt", device="cpu")
    assert first["reply"] == chat.generate_response("Hello", 5, 0, use_history=False)
    chat.system = "S"
    assert second["reply"] == chat.generate_response("a", 5, 0, use_history=False)


def test_dropped_messages_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    Path("asked.txt").write_text("x" * 50 + "\n" + "y" * 40 + "\n")
    rows("polite.pt", "--prompts", "asked.txt")
    # 32 of 64 tokens are for a prompt, three of them markers.
    err = capsys.readouterr().err
    assert "too long for the model's context: 0 oldest messages, 32 tokens were left out" in err


def test_scoring_shows_its_progress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setattr("rlchat.utils.progress.PROGRESS_AFTER_SECONDS", 0.0)
    monkeypatch.setattr("rlchat.chat.batch._SCORING_BATCH", 2)
    Path("asked.txt").write_text("Hello\n" * 5)
    assert [row["reward"] for row in rows("polite.pt", "--prompts", "asked.txt")] == [-0.5] * 5
    assert "scoring" in capsys.readouterr().err


@pytest.mark.parametrize("to_file", [True, False])
def test_responses_are_written_whatever_the_reward(
    to_file: bool, byte_tokenizer: ChatTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*reward: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
        polite = scripted_policy(byte_tokenizer, chain(byte_tokenizer, list(REPLY.encode())))
        polite.about["reward"] = list(reward)
        save_bundle("polite.pt", polite)
        words = ["chat", "polite.pt", "--prompts", "asked.txt"]
        assert main([*words, "--out", "out.json", "--force"] if to_file else words) == 0
        out, err = capsys.readouterr()
        return json.loads(Path("out.json").read_text() if to_file else out), err

    Path("asked.txt").write_text("Hello\n")
    end = {"class_path": "rlchat.rewards.MissingEnd"}
    learned = {"class_path": "rlchat.LearnedQuality", "init_args": {"bundle": "gone.pt"}}
    mine = {"class_path": "nowhere_at_all.Mine"}
    ((row,), err) = run(end, learned, mine)
    assert (row["reply"], row["reward"], row["factors"]) == (REPLY, 0.0, {"missing_end": 0.0})
    assert row["unscored"] == ["rlchat.LearnedQuality", "nowhere_at_all.Mine"]
    assert "the reward leaves out rlchat.LearnedQuality (reward model not found: copy it to gone.pt" in err
    ((row,), err) = run(learned)
    assert row["reply"] == REPLY
    assert "reward" not in row
    assert "the responses have no reward: " in err


def test_responses_are_written_before_they_are_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        assert json.loads(Path("out.json").read_text())[0]["reply"] == REPLY
        raise KeyboardInterrupt

    monkeypatch.setattr("rlchat.chat.scoring.RewardScorer.breakdown", interrupted)
    Path("asked.txt").write_text("Hello\n")
    (row,) = rows("polite.pt", "--prompts", "asked.txt", code=130)
    assert row["reply"] == REPLY


def test_an_existing_file_is_not_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    Path("asked.txt").write_text("Hello\n")
    Path("out.json").write_text("[]")
    assert rows("polite.pt", "--prompts", "asked.txt", code=2) == []
    assert "out.json exists: choose another name, or use --force" in capsys.readouterr().err
    assert len(rows("polite.pt", "--prompts", "asked.txt", "--force")) == 1


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_a_directory_is_refused_as_output(force: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("asked.txt").write_text("Hello\n")
    Path("folder").mkdir()
    assert main(["chat", "polite.pt", "--prompts", "asked.txt", "--out", "folder", *force]) == 2
    assert capsys.readouterr() == ("", "rlchat: folder is a directory: specify a file name\n")


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("asked.txt", None, "no such data file: asked.txt"),
        ("asked.txt", "\n \n", "asked.txt: contains no prompts"),
        ("asked.jsonl", "Hello\n", "asked.jsonl:1: not JSON (Expecting value at column 1); fix the line"),
    ],
)
def test_prompts_that_cannot_be_read(
    name: str, content: str | None, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        Path(name).write_text(content)
    assert main(["chat", "polite.pt", "--prompts", name]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"rlchat: {why}")
    assert err.count("\n") == 1
    assert "on_bad_line" not in err  # an option of `rlchat fit`, not of this
