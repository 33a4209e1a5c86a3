"""The goal of `rlchat demo --real`, checked by hand, and the prompts that come with the package."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import rlchat.demo.real as package
from rlchat.demo.real.goal import meets_goal
from rlchat.demo.real.measure import read_data
from rlchat.rewards import Reply

DATA = Path(package.__file__).parent / "data"


@pytest.mark.parametrize(
    ("text", "met"),
    [
        ("The capital of France is Paris.", True),
        ("Is it red?", True),  # 3 words
        ('She said "no."', True),
        ("It is a cat (a small one).", True),
        ("Paris it.", False),  # 2 words
        ("word " * 24 + "word.", True),  # 25 words
        ("word " * 25 + "word.", False),
        ("The capital of France is Paris", False),  # no full stop
        ("The capital is Paris. It is large.", False),
        ("Here is a list:\n- red\n- blue.", False),
        ("- red\n", False),
        ("", False),
        ("...", False),
    ],
)
def test_one_short_sentence(text: str, met: bool) -> None:
    assert meets_goal(Reply(text, 10, True)) is met


def test_a_truncated_reply_does_not_meet_the_goal() -> None:
    assert not meets_goal(Reply("The capital of France is Paris.", 48, False))


def rows(name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def plain(prompts: object) -> set[str]:
    """The last message of each prompt in lower case, without punctuation."""
    assert isinstance(prompts, list)
    return {" ".join(re.findall(r"\w+", prompt.messages[-1].text.lower())) for prompt in prompts}


def test_there_are_enough_prompts_and_they_are_small() -> None:
    assert len(rows("train.jsonl")) >= 300
    assert len(rows("held_out.jsonl")) >= 100
    assert len(rows("control.jsonl")) >= 20
    assert sum(path.stat().st_size for path in DATA.iterdir()) < 1_000_000
    assert "Apache License" in (DATA / "LICENSE").read_text()


def test_no_held_out_prompt_is_trained_on() -> None:
    trained = plain(read_data("train.jsonl")) | plain(read_data("facts.jsonl"))
    firsts = {" ".join(re.findall(r"\w+", p.messages[0].text.lower())) for p in read_data("train.jsonl")}
    held_out, control = plain(read_data("held_out.jsonl")), plain(read_data("control.jsonl"))
    assert len(held_out) == len(rows("held_out.jsonl"))
    assert len(control) == len(rows("control.jsonl"))
    assert not (trained | firsts) & (held_out | control)


def test_questions_with_an_answer_have_a_check_and_the_others_have_none() -> None:
    for name in ("facts.jsonl", "control.jsonl"):
        assert all(prompt.check is not None for prompt in read_data(name))
    for name in ("train.jsonl", "held_out.jsonl"):
        assert all(prompt.check is None for prompt in read_data(name))


def test_many_held_out_prompts_have_a_human_reply() -> None:
    assert sum(bool(prompt.references) for prompt in read_data("held_out.jsonl")) >= 40


@pytest.mark.parametrize(
    ("question", "reply", "correct"),
    [
        ("What is the capital of France?", "The capital of France is Paris.", True),
        ("What is the capital of France?", "La femme, le grand…", False),
        ("How many legs does a spider have?", "A spider has Eight legs.", True),
        ("How many legs does a spider have?", "It has 8.", True),
        ("How many legs does a spider have?", "It has 18 legs.", False),
        ("What is the chemical formula of water?", "Water is H2O.", True),
        ("At what temperature in degrees Celsius does water boil?", "At 1000 degrees.", False),
    ],
)
def test_control_answers(question: str, reply: str, correct: bool) -> None:
    (prompt,) = [p for p in read_data("control.jsonl") if p.messages[-1].text == question]
    assert prompt.check is not None
    assert prompt.check.passes(reply) is correct
