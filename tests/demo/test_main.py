"""`rlchat demo`, shortened to a few batches per stage: its report, the files it writes, and what it prints."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import rlchat, working_in
from rich.cells import cell_len

from rlchat import ChatInterface
from rlchat.__main__ import main
from rlchat.data.formats import read_trees
from rlchat.demo.first_messages import FIRST_MESSAGES
from rlchat.demo.tables import commands_folder

TREES = 150


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which the demo ran, and its output."""
    folder = tmp_path_factory.mktemp("demo")
    screen = folder / "screen.txt"
    with working_in(folder), pytest.MonkeyPatch.context() as patch, screen.open("w+") as file:
        patch.setattr(sys, "stdout", file)
        patch.setenv("COLUMNS", "80")
        rlchat("demo", "--fast", "--trees", str(TREES), "--threads", "1")
    return folder, screen.read_text()


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "checkpoints" / "report.json").read_text())


def test_the_report_has_the_figures_by_stage(demo: tuple[Path, str]) -> None:
    figures = report(demo[0])
    assert list(figures) == ["sft", "reward", "ppo", "first_messages"]
    assert {"perplexity", "accuracy", "seconds"} <= set(figures["sft"])
    assert {"pair_accuracy", "right_over_wrong", "seconds"} <= set(figures["reward"])
    assert list(figures["ppo"]) == ["before", "after"]
    measured = {"answer_accuracy", "answer_accuracy_greedy", "reward", "kl", "perplexity", "accuracy", "distinct_2"}
    measured |= {"response_length", "truncated_fraction", "sensible_first_messages"}
    measured |= {"second_question_accuracy", "second_question_accuracy_greedy"}
    assert measured <= set(figures["ppo"]["before"])
    assert measured | {"seconds"} <= set(figures["ppo"]["after"])
    assert figures["ppo"]["before"]["kl"] == 0  # the SFT model is the reference
    assert figures["ppo"]["after"]["kl"] != 0
    numbers = [figures["sft"], figures["reward"], *figures["ppo"].values()]
    assert all(math.isfinite(value) for stage in numbers for value in stage.values())


def test_the_report_has_every_first_message_with_its_reply(demo: tuple[Path, str]) -> None:
    figures = report(demo[0])
    rows = figures["first_messages"]
    assert [row["message"] for row in rows] == [message.text for message in FIRST_MESSAGES]
    assert [row["sensible"] for row in rows] == [
        message.accepts(row["reply"]) for message, row in zip(FIRST_MESSAGES, rows, strict=True)
    ]
    sensible = sum(row["sensible"] for row in rows) / 40
    assert figures["ppo"]["after"]["sensible_first_messages"] == pytest.approx(sensible, abs=1e-4)


def test_the_sft_model_is_measured_as_the_one_before_ppo(demo: tuple[Path, str]) -> None:
    figures = report(demo[0])
    for name in ("perplexity", "accuracy"):
        assert figures["ppo"]["before"][name] == pytest.approx(figures["sft"][name], rel=1e-3)


def test_the_files_it_writes(demo: tuple[Path, str]) -> None:
    folder, _ = demo
    left = {path.name for path in (folder / "checkpoints").iterdir()}
    models = {"sft_model", "reward_model", "rl_chat_model_tiktoken"}
    reports = {f"report.{ending}" for ending in ("json", "html", "png")}
    assert left == {f"{name}.pt" for name in models} | {f"{name}_stats.png" for name in models} | reports
    for name in models:
        assert (folder / "checkpoints" / f"{name}_stats.png").read_bytes().startswith(b"\x89PNG")
    trees, _ = read_trees([folder / "data" / "demo.jsonl"], progress=False)
    assert len(trees) == TREES


def test_each_stage_runs_the_command_that_it_prints(demo: tuple[Path, str]) -> None:
    commands = [line.removeprefix("$ ").strip() for line in demo[1].splitlines() if line.startswith("$ rlchat")]
    assert commands == [
        "rlchat fit --config demo/sft",
        "rlchat test --config demo/sft --ckpt_path=best",
        "rlchat fit --config demo/reward",
        "rlchat test --config demo/reward --ckpt_path=best",
        "rlchat test --config demo/ppo",
        "rlchat fit --config demo/ppo",
        "rlchat test --config demo/ppo --ckpt_path=best",
    ]


def test_the_output_ends_with_replies_figures_and_the_next_commands(demo: tuple[Path, str]) -> None:
    folder, screen = demo
    before, after = (report(folder)["ppo"][when]["perplexity"] for when in ("before", "after"))
    assert re.search(rf"perplexity on human replies, good and bad +│ +{before:.3f} +│ +{after:.3f}", screen)
    before, after = (report(folder)["ppo"][when]["second_question_accuracy"] for when in ("before", "after"))
    assert re.search(rf"correct after a change of subject, sampled +│ +{before:.3f} +│ +{after:.3f}", screen)
    assert "before PPO (SFT)" in screen
    ending = screen[screen.index("Next:") :]
    others = ("rlchat look", "tensorboard --logdir lightning_logs", "rlchat demo --seed 1")
    for command in ("rlchat chat", "rlchat serve", *others):
        assert re.search(rf"^  {command}  ", ending, re.MULTILINE)
    assert screen.rstrip().endswith('Try "Hello, how are you?", "What is the capital of Belan?" or "3 + 4".')
    assert "Traceback" not in screen
    assert max(map(cell_len, screen.splitlines())) <= 80


def test_commands_of_a_virtual_environment_that_is_not_active_are_shown_with_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / ".venv" / "bin" / "rlchat"
    program.parent.mkdir(parents=True)
    program.touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(program), "demo"])
    monkeypatch.setenv("PATH", "")
    assert commands_folder() == f".venv{os.sep}bin{os.sep}"
    monkeypatch.setenv("PATH", str(program.parent))
    assert commands_folder() == ""


def test_the_model_can_be_chatted_with(demo: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo[0])
    chat = ChatInterface("checkpoints/rl_chat_model_tiktoken.pt")
    assert isinstance(chat.generate_response("Hello, how are you?"), str)


def test_data_only_writes_the_data_and_keeps_an_older_file(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rlchat("demo", "--data-only", "--trees", "5")
    assert "data/demo.jsonl: 5 conversation trees, made with seed 0" in capsys.readouterr().out
    first = (workplace / "data" / "demo.jsonl").read_bytes()
    rlchat("demo", "--data-only", "--trees", "5")
    assert [path.name for path in (workplace / "data").iterdir()] == ["demo.jsonl"]
    rlchat("demo", "--data-only", "--trees", "5", "--seed", "1")
    older, newer = sorted((workplace / "data").iterdir(), key=lambda path: path.name)
    assert older.read_bytes() == first
    assert newer.name == "demo.jsonl"
    assert newer.read_bytes() != first
    assert not (workplace / "checkpoints").exists()


def test_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--help"]) == 0
    assert main(["demo", "--sede", "1"]) == 2


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--seed", "x", "an integer"),
        ("--seed", "-1", "an integer of at least 0"),
        ("--trees", "0", "an integer of at least 1"),
        ("--threads", "two", "an integer"),
        ("--threads", "0", "an integer of at least 1"),
    ],
)
def test_a_number_out_of_range_is_rejected(
    option: str, value: str, expected: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", f"{option}={value}"]) == 2
    assert f"invalid value '{value}' for {option}: expected {expected}\n" in capsys.readouterr().err
    assert not list(workplace.iterdir())
