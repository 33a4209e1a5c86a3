"""Replay: the split of the original training, what is left out, and what a model file says about its data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlchat.conversation import Conversation, Message
from rlchat.data.datamodule import DataNeeds, OASST2DataModule
from rlchat.data.forest import tree_id_of
from rlchat.errors import UserError
from rlchat.learn.replay import data_of, everyday_replay, read_replay
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

SPLIT: dict[str, Any] = {"seed": 3, "val_fraction": 0.2, "test_fraction": 0.2}
LIMITS = {"limit": 1000, "held_out_limit": 1000}


def row(n: int) -> dict[str, Any]:
    question = {"role": "user", "content": f"What comes after {n}?"}
    messages = [question, {"role": "assistant", "content": f"It is {n + 1}."}]
    return {"messages": messages, "quality": n % 2, **({"answer": str(n + 1)} if n % 3 else {})}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row(n)) + "\n" for n in range(60)))
    return path


def questions(prompts: list[Conversation]) -> set[str]:
    return {prompt.messages[0].text for prompt in prompts}


def test_the_split_is_that_of_the_training(data: Path, tokenizer: ChatTokenizer) -> None:
    module = OASST2DataModule(str(data), **SPLIT)
    module.needs = DataNeeds("ppo", tokenizer, 64, max_new_tokens=8)
    module.setup()
    replay = read_replay([data], SPLIT, (), **LIMITS)
    trained, val, test = (questions(module.sample_prompts(1000, side)) for side in ("train", "val", "test"))
    assert questions(replay.prompts) == trained
    assert questions(replay.threads) == val | test
    assert replay.checked
    assert questions(replay.controls) == {q for q in val | test if int(q.split()[-1][:-1]) % 3}
    assert questions(replay.judged) == trained  # all replies have a label


def test_replies_of_low_quality_are_not_human_replies_to_keep_to(data: Path) -> None:
    replay = read_replay([data], SPLIT, (), **LIMITS)
    learned = {int(t.messages[0].text.split()[-1][:-1]) % 2: t.messages[1].learn for t in replay.threads}
    assert learned == {0: False, 1: True}


def test_prompts_of_verdicts_are_left_out_and_limits_hold(data: Path) -> None:
    everything = read_replay([data], SPLIT, (), **LIMITS)
    some = [*everything.prompts[:3], *everything.controls[:3]]
    openings = {tree_id_of(prompt.messages) for prompt in some}
    rest = read_replay([data], SPLIT, openings, **LIMITS)
    assert rest.prompts == everything.prompts[3:]
    assert rest.controls == everything.controls[3:]
    few = read_replay([data], SPLIT, (), limit=2, held_out_limit=1)
    assert (few.prompts, few.controls) == (everything.prompts[:2], everything.controls[:1])
    with pytest.raises(UserError, match="no prompts to replay"):
        read_replay(
            [data], SPLIT, {tree_id_of([Message("user", f"What comes after {n}?")]) for n in range(60)}, **LIMITS
        )


def test_without_data_there_are_packaged_prompts() -> None:
    replay = everyday_replay(5, ())
    assert len(replay.prompts) == 5
    assert len(replay.controls) > 10
    assert questions(replay.prompts) & questions(replay.controls) == set()
    assert not replay.checked
    taught = {tree_id_of(replay.prompts[0].messages), tree_id_of(replay.controls[0].messages)}
    rest = everyday_replay(5, taught)
    assert rest.prompts[:4] == replay.prompts[1:]
    assert rest.controls == replay.controls[1:]


def test_a_model_file_names_its_data() -> None:
    data = {"path": ["a.jsonl"], "seed": 3, "val_fraction": 0.2, "test_fraction": 0.2}
    assert data_of({"data": data}) == (["a.jsonl"], SPLIT)
    default = {"seed": 0, "val_fraction": 0.05, "test_fraction": 0.05}
    for about in ({}, {"data": 3}, {"data": {"path": "a"}}, {"data": {"path": [3], "seed": "x"}}):
        assert data_of(about) == ([], default)


def test_an_absolute_path_is_not_recorded(tmp_path: Path) -> None:
    module = OASST2DataModule([str(tmp_path / "a.jsonl"), "data/b.jsonl", "../ann/c.jsonl"], seed=3)
    assert module.describe() == {
        "path": ["data/b.jsonl"],
        "seed": 3,
        "val_fraction": 0.05,
        "test_fraction": 0.05,
    }
