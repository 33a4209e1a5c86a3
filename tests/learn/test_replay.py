"""Replay: the split of the original training, what is left out, and what a model file says about its data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlchat.conversation import Conversation, Message
from rlchat.data.datamodule import DataNeeds, OASST2DataModule
from rlchat.data.forest import tree_id_of
from rlchat.data.loading import Reading
from rlchat.errors import UserError
from rlchat.learn.replay import TrainingData, data_of, everyday_replay, read_replay
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


def named(path: Path) -> TrainingData:
    """``path`` as the data that a model was trained on with :data:`SPLIT`."""
    return data_of({"data": {"path": [str(path)], **SPLIT}})


def questions(prompts: list[Conversation]) -> set[str]:
    return {prompt.messages[0].text for prompt in prompts}


def test_the_split_is_that_of_the_training(data: Path, tokenizer: ChatTokenizer) -> None:
    module = OASST2DataModule(str(data), **SPLIT)
    module.needs = DataNeeds("ppo", tokenizer, 64, max_new_tokens=8)
    module.setup()
    replay = read_replay(named(data), (), **LIMITS)
    trained, val, test = (questions(module.sample_prompts(1000, side)) for side in ("train", "val", "test"))
    assert questions(replay.prompts) == trained
    assert questions(replay.threads) == val | test
    assert replay.checked
    assert questions(replay.controls) == {q for q in val | test if int(q.split()[-1][:-1]) % 3}
    assert questions(replay.judged) == trained  # all replies have a label


def test_replies_of_low_quality_are_not_human_replies_to_keep_to(data: Path) -> None:
    replay = read_replay(named(data), (), **LIMITS)
    learned = {int(t.messages[0].text.split()[-1][:-1]) % 2: t.messages[1].learn for t in replay.threads}
    assert learned == {0: False, 1: True}


def test_prompts_of_verdicts_are_left_out_and_limits_hold(data: Path) -> None:
    everything = read_replay(named(data), (), **LIMITS)
    some = [*everything.prompts[:3], *everything.controls[:3]]
    openings = {tree_id_of(prompt.messages) for prompt in some}
    rest = read_replay(named(data), openings, **LIMITS)
    assert rest.prompts == everything.prompts[3:]
    assert rest.controls == everything.controls[3:]
    few = read_replay(named(data), (), limit=2, held_out_limit=1)
    assert (few.prompts, few.controls) == (everything.prompts[:2], everything.controls[:1])
    with pytest.raises(UserError, match="no prompts to replay"):
        read_replay(named(data), {tree_id_of([Message("user", f"What comes after {n}?")]) for n in range(60)}, **LIMITS)


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
    data = {"path": ["a.jsonl"], **SPLIT, "lang": None, "on_bad_line": "skip", "keep_synthetic": True}
    found = data_of({"data": {**data, "split_text": True}})
    assert (found.paths, found.split) == (["a.jsonl"], SPLIT)
    assert found.reading == Reading(None, "skip", keep_synthetic=True, split_text=True)


def test_what_a_model_file_does_not_say_is_as_by_default() -> None:
    default = data_of({"data": OASST2DataModule().describe()})
    assert default.split == {"seed": 0, "val_fraction": 0.05, "test_fraction": 0.05}
    wrong = {"path": [3], "seed": "x", "lang": 3, "on_bad_line": "x", "keep_synthetic": 1, "split_text": None}
    for about in ({}, {"data": 3}, {"data": {"path": "a"}}, {"data": wrong}):
        assert data_of(about) == default


def test_the_data_is_read_as_in_training(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    path = tmp_path / "trees.jsonl"
    lines = [
        json.dumps({**tree(n, lang), "synthetic": n % 3 == 0}) for n, lang in enumerate(("en", "de", "en", "de", "en"))
    ]
    path.write_text("\n".join([*lines, "damaged"]) + "\n")
    for options in ({"lang": "de"}, {"lang": None}, {"lang": "en", "keep_synthetic": True}):
        module = OASST2DataModule(str(path), on_bad_line="skip", val_fraction=0.0, test_fraction=0.0, **options)
        module.needs = DataNeeds("ppo", tokenizer, 64, max_new_tokens=8)
        module.setup()
        recorded = replace(data_of({"data": module.describe()}), paths=[str(path)])
        replay = read_replay(recorded, (), **LIMITS)
        assert questions(replay.prompts) == questions(module.sample_prompts(1000, "train"))
    with pytest.raises(UserError, match="not JSON"):
        read_replay(replace(data_of({}), paths=[str(path)]), (), **LIMITS)


def tree(n: int, lang: str) -> dict[str, Any]:
    reply = {"message_id": f"r{n}", "parent_id": f"q{n}", "role": "assistant", "text": f"It is {n}.", "lang": lang}
    return {"message_id": f"q{n}", "role": "prompter", "text": f"{lang} {n}?", "lang": lang, "replies": [reply]}


def test_an_absolute_path_is_not_recorded(tmp_path: Path) -> None:
    module = OASST2DataModule([str(tmp_path / "a.jsonl"), "data/b.jsonl", "../ann/c.jsonl"], seed=3)
    described = module.describe()
    assert (described["path"], described["seed"]) == (["data/b.jsonl"], 3)
