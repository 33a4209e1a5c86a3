"""The messages that SFT trains on: selected by label, rank and position, each once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers.data_rows import node, root, tokenized, tree_row, write

from rlchat.data.corpus import DataNeeds
from rlchat.data.formats import read_trees
from rlchat.data.imitation import Imitation
from rlchat.data.tokenizing import Tokenization
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

# q1 ┬ a1 (rank 0, quality .9) ┬ q2 ─ a3
#    │                          └ q3 ─ a4 (quality .2)
#    └ a2 (rank 1)
TREE = tree_row(
    root(
        node(
            "a1",
            "assistant",
            node("q2", "prompter", node("a3", "assistant")),
            node("q3", "prompter", node("a4", "assistant", labels={"quality": {"value": 0.2}})),
            rank=0,
            labels={"quality": {"value": 0.9}},
        ),
        node("a2", "assistant", rank=1),
    )
)


def learned(tmp_path: Path, tokenizer: ChatTokenizer, length: int = 64, **options: Any) -> tuple[list[str], str]:
    """The text with a loss in each thread, and the report."""
    trees, _ = read_trees([write(tmp_path / "d.jsonl", TREE)])
    how = Tokenization(DataNeeds("sft", tokenizer, length), Imitation(**options))
    corpus = tokenized(trees, how, tmp_path)
    ids, mask = corpus.sequences.ids, corpus.sequences.loss_mask
    return [tokenizer.decode(ids[row][mask[row]].tolist()) for row in range(len(ids))], corpus.report


def test_each_message_is_trained_on_once(tmp_path: Path, byte_tokenizer: ChatTokenizer) -> None:
    texts, report = learned(tmp_path, byte_tokenizer)
    assert sorted(texts) == ["a1a3", "a2", "a4"]
    assert report == "imitating 4 responses"


def test_messages_are_selected_by_label_rank_and_position(tmp_path: Path, byte_tokenizer: ChatTokenizer) -> None:
    texts, report = learned(tmp_path, byte_tokenizer, min_quality=0.5, best_rank_only=True)
    assert texts == ["a1a3"]
    assert report == "imitating 2 responses and not 1 of quality below 0.5, 1 of lower rank"
    assert learned(tmp_path, byte_tokenizer, min_quality=0.2)[0] == ["a1a3", "a4", "a2"]
    texts, report = learned(tmp_path, byte_tokenizer, loss_on="last")
    assert sorted(texts) == ["a2", "a3", "a4"]
    assert report == "imitating 3 responses and not 1 before the last"


def test_a_message_that_truncation_dropped_is_trained_on_in_another_thread(
    tmp_path: Path, byte_tokenizer: ChatTokenizer
) -> None:
    # 8 tokens hold one turn of 4 + 4: a1 is dropped from both threads that continue it, so neither trains on it.
    texts, _ = learned(tmp_path, byte_tokenizer, length=8)
    assert sorted(texts) == ["a2", "a3", "a4"]
