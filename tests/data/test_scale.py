"""Data in parts: the same examples as at once, from several processes too, and memory that does not grow with it."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.data_rows import SMALL, tokenized, tree_row

from rlchat.conversation import Conversation
from rlchat.data import tokenizing
from rlchat.data.corpus import DataNeeds, Ragged
from rlchat.data.datamodule import OASST2DataModule
from rlchat.data.forest import ForestBuilder
from rlchat.data.formats import read_forest, read_trees
from rlchat.data.imitation import Imitation
from rlchat.data.splits import unit_hash
from rlchat.data.tokenizing import Tokenization, tokenize_trees, whole_conversations
from rlchat.errors import UserError
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer
from rlchat.tokenizer.rendering import Rendered
from rlchat.utils.cache_folder import entries

OASST = Path(__file__).parent / "samples" / "oasst.messages.jsonl.gz"
IMITATION = Imitation(min_quality=0.5, best_rank_only=True)


def rows() -> Iterator[dict[str, Any]]:
    """61 rows in 51 trees; the rows of a tree are not neighbours."""
    for i in range(20):
        turns = [f"question {i % 10}", f"answer {i}", "and then?", f"then {i}"]
        yield {"messages": [{"content": text} for text in turns], "quality": i / 20}
        yield {"text": f"text {i}", "quality": 1.0}
        yield {"prompt": f"which is better, {i}?", "chosen": "this one", "rejected": "that one"}
    yield tree_row(SMALL)


def write(path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return path


def listed(ragged: Ragged) -> list[list[int]]:
    return [ragged[row].tolist() for row in range(len(ragged))]


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize("task", ["sft", "reward", "ppo"])
def test_parts_have_the_examples_of_the_trees(
    tmp_path: Path, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch, task: Any, processes: int
) -> None:
    """Each example is rendered here in the plain way, from the trees in memory."""
    monkeypatch.setattr(tokenizing, "TREES_IN_A_PART", 4)
    trees, _ = read_trees([write(tmp_path / "d.jsonl"), OASST], progress=False)
    needs = DataNeeds(task, tokenizer, 256, 32 if task == "ppo" else 0, whole_conversations=task == "ppo")
    corpus = tokenized(trees, Tokenization(needs, IMITATION), tmp_path, processes)
    assert list(corpus.tree_ids) == [tree.id for tree in trees]
    assert list(corpus.split_ids) == [tree.opening_id for tree in trees]
    if task == "reward":
        judged = [(i, p) for i, tree in enumerate(trees) for p in tree.prompts if tokenizing._is_judged(p, needs)]
        marked = [[m for m in p.references if m.rank is not None or m.quality is not None] for _, p in judged]
        assert corpus.ranked.tree.tolist() == [i for i, _ in judged]
        assert corpus.ranked.replies.diff().tolist() == [len(some) for some in marked]
        expected = [
            tokenizer.render_response(p, m, 256).ids for (_, p), some in zip(judged, marked, strict=True) for m in some
        ]
        assert listed(corpus.ranked.ids) == expected
        assert corpus.ranked.rank.tolist() == [-1 if m.rank is None else m.rank for some in marked for m in some]
        return
    for row, tree in enumerate(corpus.sequences.tree.tolist()):
        ids = corpus.sequences.ids[row].tolist()
        assert ids in [tokenizer.render(thread, 256).ids for thread in trees[tree].threads]
        assert len(corpus.sequences.loss_mask[row]) == len(ids)
        assert corpus.sequences.loss_mask[row].any()
    asked: list[tuple[int, Conversation]] = []
    for i, tree in enumerate(trees):
        prompts = [p for p in tree.prompts if p.is_prompt]
        asked += [(i, p) for p in (prompts[:1] if task == "sft" else whole_conversations(prompts))]
    assert corpus.prompts.tree.tolist() == [i for i, _ in asked]
    assert list(corpus.prompts.conversations) == [p for _, p in asked]
    assert listed(corpus.prompts.ids) == [tokenizer.render_prompt(p, needs.prompt_length).ids for _, p in asked]


@pytest.mark.parametrize("task", ["sft", "reward", "ppo"])
def test_the_size_of_parts_and_the_number_of_processes_change_nothing(
    tmp_path: Path, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch, task: Any
) -> None:
    trees, _ = read_trees([write(tmp_path / "d.jsonl"), OASST], progress=False)
    how = Tokenization(DataNeeds(task, tokenizer, 128), IMITATION, contrast=True, split_seed=3)

    def files(name: str, size: int, processes: int) -> dict[str, bytes]:
        monkeypatch.setattr(tokenizing, "TREES_IN_A_PART", size)
        (tmp_path / name).mkdir()
        tokenize_trees(trees, how, tmp_path / name, processes=processes)
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    at_once = files("whole", 1000, 0)
    assert files("parts", 3, 0) == at_once
    assert files("processes", 3, 2) == at_once


@pytest.mark.parametrize("processes", [0, 2])
def test_the_global_random_numbers_do_not_depend_on_the_cache(
    tmp_path: Path, byte_tokenizer: ChatTokenizer, processes: int
) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    trees, _ = read_trees([write(tmp_path / "d.jsonl")], progress=False)
    tokenized(trees, Tokenization(DataNeeds("sft", byte_tokenizer, 64)), tmp_path, processes)
    assert torch.rand(3).equal(expected)


class FailingTokenizer(ChatTokenizer):
    def render_prompt(self, conversation: Conversation, max_length: int | None = None) -> Rendered:
        raise UserError(f"cannot encode {conversation.messages[-1].text}")


@pytest.mark.parametrize("processes", [0, 2])
def test_an_error_of_a_process_keeps_its_message(tmp_path: Path, encoding: str, processes: int) -> None:
    trees, _ = read_trees([write(tmp_path / "d.jsonl")], progress=False)
    how = Tokenization(DataNeeds("ppo", FailingTokenizer(encoding), 64, 8))
    with pytest.raises(UserError, match=r"^cannot encode question 0$"):
        tokenized(trees, how, tmp_path, processes)


def test_a_forest_has_the_trees_in_the_order_of_their_first_rows(tmp_path: Path) -> None:
    forest, report = read_forest([write(tmp_path / "d.jsonl")], tmp_path / "trees", progress=False)
    openings = [tree.threads[0].messages[0].text for tree in forest]
    expected = []
    for i in range(20):
        expected += ([f"question {i}"] if i < 10 else []) + [f"text {i}", f"which is better, {i}?"]
    assert openings == [*expected, "q1"]
    assert len(forest) == report.trees == 51
    assert [len(tree.threads) for tree in forest[:3]] == [2, 1, 1]
    assert forest[-1].id == SMALL["message_id"]
    assert report.threads == sum(len(tree.threads) for tree in forest)
    assert report.prompts == sum(prompt.is_prompt for tree in forest for prompt in tree.prompts)
    assert report.responses == 20


@pytest.mark.slow
def test_reading_and_tokenizing_keep_few_bytes_per_row(tmp_path: Path, byte_tokenizer: ChatTokenizer) -> None:
    """A row of 2,000 characters takes at most 100 bytes after the first 2,000 rows."""

    def write_rows(count: int) -> Path:
        with (tmp_path / "d.jsonl").open("w") as file:
            for i in range(count):
                row = {"messages": [{"content": f"{i}"}, {"content": "x" * 2000}]}
                file.write(json.dumps(row) + "\n")
        return tmp_path / "d.jsonl"

    def peak(count: int) -> int:
        path = write_rows(count)
        how = Tokenization(DataNeeds("ppo", byte_tokenizer, 64, 8))
        tracemalloc.start()
        forest, _ = read_forest([path], tmp_path / "trees", progress=False)
        tokenized(forest, how, tmp_path)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(100)  # what is imported and cached at the first use
    assert peak(4000) - peak(2000) < 2000 * 100


def test_another_seed_has_the_places_of_its_own_hash(
    tmp_path: Path, byte_tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlchat.data.corpus._STRINGS_AT_ONCE", 7)
    trees, _ = read_trees([write(tmp_path / "d.jsonl")], progress=False)
    corpus = tokenized(trees, Tokenization(DataNeeds("sft", byte_tokenizer, 64), split_seed=3), tmp_path)
    assert list(corpus.split_ids) == [corpus.split_ids[i] for i in range(51)] == [tree.opening_id for tree in trees]
    for seed in (3, 4):
        assert corpus.places(seed).tolist() == [unit_hash(seed, tree.opening_id) for tree in trees]


def test_rows_of_one_tree_are_merged_in_their_order(tmp_path: Path) -> None:
    trees, report = read_trees([write(tmp_path / "d.jsonl")], progress=False)
    first = trees[0]
    assert [[m.text for m in thread.messages] for thread in first.threads] == [
        ["question 0", "answer 0", "and then?", "then 0"],
        ["question 0", "answer 10", "and then?", "then 10"],
    ]
    assert [[m.text for m in prompt.references] for prompt in first.prompts] == [
        ["answer 0", "answer 10"],
        ["then 0"],
        ["then 10"],
    ]
    assert {c.tree_id for c in first.threads + first.prompts} == {first.id}
    assert "duplicate threads" not in report.dropped


def test_a_row_without_content_is_no_tree(tmp_path: Path) -> None:
    with ForestBuilder(tmp_path / "trees") as builder:
        builder.add("a", [], [])
        assert list(builder.finish()) == []


def test_the_cache_folder_keeps_only_arrays(tmp_path: Path, byte_tokenizer: ChatTokenizer) -> None:
    """The file of the trees and the unfinished folder are gone after the first start."""
    data = OASST2DataModule(str(write(tmp_path / "d.jsonl")), cache_dir=str(tmp_path / "c"))
    data.needs = DataNeeds("sft", byte_tokenizer, 64)
    data.prepare_data()
    assert {entry.what for entry in entries(tmp_path / "c")} <= {"tokenized data", "file hashes"}
    (folder,) = (entry.path for entry in entries(tmp_path / "c") if entry.what == "tokenized data")
    assert {path.suffix for path in folder.iterdir()} == {".bin", ".json"}
    assert not [path for path in (tmp_path / "c").iterdir() if path.name.startswith(".")]
