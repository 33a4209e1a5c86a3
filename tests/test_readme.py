"""What the README tells people to type works: commands run or parse, code runs, and files that it names exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import jsonargparse
import pytest
import yaml
from helpers.chat_models import random_policy

from rlchat.__main__ import COMMANDS, main
from rlchat.conversation import Conversation, Message
from rlchat.models.model_file import save_bundle
from rlchat.rewards import Reply, Reward
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
SHELL = "".join(body for language, body in BLOCKS if not language).replace("\\\n", " ")
COMMAND_LINES = [line.split("#")[0].strip() for line in SHELL.splitlines() if line.startswith("rlchat ")]
TRAINING = [line for line in COMMAND_LINES if line.split()[1] in ("fit", "validate", "test")]


def block(language: str, word: str) -> str:
    """The one block in ``language`` that holds ``word``."""
    (found,) = [body for name, body in BLOCKS if name == language and word in body]
    return found


@pytest.mark.parametrize("line", TRAINING)
def test_training_commands_parse(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(line.replace("$D", "train.jsonl.gz dev.jsonl.gz"))[1:]
    if "--ckpt_path" in words:  # what it names is looked for before anything is printed
        place = words.index("--ckpt_path")
        del words[place : place + 2]
    assert main([*words, "--print_config"]) == 0
    assert "class_path" in yaml.safe_load(capsys.readouterr().out)["model"]


def test_every_command_is_one() -> None:
    assert TRAINING
    assert {line.split()[1] for line in COMMAND_LINES} <= set(COMMANDS)


def test_nothing_waits_to_be_filled_in() -> None:
    assert "@@" not in TEXT
    assert "TODO" not in TEXT


def test_make_has_the_targets() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^make (\w+)", SHELL, re.MULTILINE))
    assert {"demo", "chat"} <= named <= targets


def test_files_that_it_links_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    local = [link for link in links if "://" not in link]
    assert any(link.endswith(".png") for link in local)
    assert [link for link in local if not (ROOT / link).exists()] == []


def test_modules_that_it_names_exist() -> None:
    named = re.findall(r"`(\w+\.py)`", TEXT.split("## How it is built")[1].split("## ")[0])
    assert len(named) > 15
    assert [name for name in named if not (ROOT / "rlchat" / name).is_file()] == []


def test_the_chat_in_two_lines(
    tmp_path: Path, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_bundle("checkpoints/rl_chat_model_tiktoken.pt", random_policy(tokenizer))
    exec(block("python", "ChatInterface"), {})
    assert capsys.readouterr().out.strip()


def test_a_reward_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(block("python", "ReplyFactor"))
    monkeypatch.syspath_prepend(str(tmp_path))
    named = yaml.safe_load(block("yaml", "my_rewards"))["reward"]
    named["init_args"]["factors"] = named["init_args"]["factors"][:1]  # the other one needs a trained bundle
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--reward", type=Reward)
    reward = parser.instantiate_classes(parser.parse_object({"reward": named})).reward
    prompt = Conversation((Message("user", "Tea?"),))
    scores = reward([prompt, prompt], [Reply("Yes, please.", 4, True), Reply("No.", 2, True)])
    assert scores.tolist() == [1.0, 0.0]
