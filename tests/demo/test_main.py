"""`rlchat demo`, shortened to a few batches of each stage: its report, what it leaves, and what it says."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command_line import rlchat
from rich.cells import cell_len

from rlchat import ChatInterface
from rlchat.__main__ import main
from rlchat.data.formats import read_trees

TREES = 150


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which the demo ran, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    screen = folder / "screen.txt"
    with pytest.MonkeyPatch.context() as patch, screen.open("w+") as file:
        patch.chdir(folder)
        patch.setattr(sys, "path", [*sys.path])
        patch.setattr(sys, "stdout", file)
        patch.setenv("COLUMNS", "80")
        threads = torch.get_num_threads()
        rlchat("demo", "--fast", "--trees", str(TREES), "--threads", "1")
        torch.set_num_threads(threads)
    return folder, screen.read_text()


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "checkpoints" / "report.json").read_text())


def test_the_report_has_the_figures_by_stage(demo: tuple[Path, str]) -> None:
    figures = report(demo[0])
    assert list(figures) == ["sft", "reward", "ppo"]
    assert {"perplexity", "accuracy", "seconds"} <= set(figures["sft"])
    assert {"pair_accuracy", "right_over_wrong", "seconds"} <= set(figures["reward"])
    assert list(figures["ppo"]) == ["before", "after"]
    measured = {"answer_accuracy", "answer_accuracy_greedy", "reward", "kl", "perplexity", "accuracy", "distinct_2"}
    assert measured | {"response_length", "truncated_fraction"} <= set(figures["ppo"]["before"])
    assert measured | {"seconds"} <= set(figures["ppo"]["after"])
    assert figures["ppo"]["before"]["kl"] == 0  # the SFT model is the reference
    assert figures["ppo"]["after"]["kl"] != 0
    numbers = [figures["sft"], figures["reward"], *figures["ppo"].values()]
    assert all(math.isfinite(value) for stage in numbers for value in stage.values())


def test_the_sft_model_is_measured_as_the_one_before_ppo(demo: tuple[Path, str]) -> None:
    figures = report(demo[0])
    for name in ("perplexity", "accuracy"):
        assert figures["ppo"]["before"][name] == pytest.approx(figures["sft"][name], rel=1e-3)


def test_what_it_leaves(demo: tuple[Path, str]) -> None:
    folder, _ = demo
    left = {path.name for path in (folder / "checkpoints").iterdir()}
    models = {"sft_model", "reward_model", "rl_chat_model_tiktoken"}
    assert left == {f"{name}.pt" for name in models} | {f"{name}_stats.png" for name in models} | {"report.json"}
    for name in models:
        assert (folder / "checkpoints" / f"{name}_stats.png").read_bytes().startswith(b"\x89PNG")
    trees, _ = read_trees([folder / "data" / "demo.jsonl"], progress=False)
    assert len(trees) == TREES


def test_each_stage_is_the_command_that_it_prints(demo: tuple[Path, str]) -> None:
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


def test_it_ends_with_replies_figures_and_what_to_type(demo: tuple[Path, str]) -> None:
    folder, screen = demo
    before, after = (report(folder)["ppo"][when]["perplexity"] for when in ("before", "after"))
    assert re.search(rf"perplexity on human replies, good and bad +│ +{before:.3f} +│ +{after:.3f}", screen)
    assert "before PPO (SFT)" in screen
    assert screen.rstrip().endswith("Talk with it:  rlchat chat")
    assert "Traceback" not in screen
    assert max(map(cell_len, screen.splitlines())) <= 80


def test_one_can_talk_with_it(demo: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo[0])
    chat = ChatInterface("checkpoints/rl_chat_model_tiktoken.pt")
    assert isinstance(chat.generate_response("Hello, how are you?"), str)


def test_the_data_alone(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
