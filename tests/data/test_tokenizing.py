"""Prompts of long conversations have the same tokens as the whole conversation, at a cost linear in its length."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.data_rows import tokenized, write

from rlchat.data.corpus import Corpus, DataNeeds, StoredConversations
from rlchat.data.forest import Tree
from rlchat.data.formats import read_trees
from rlchat.data.tokenizing import Tokenization
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer


class CountingTokenizer(ChatTokenizer):
    """Counts the characters that are encoded."""

    encoded = 0

    def encode(self, text: str) -> list[int]:
        self.encoded += len(text)
        return super().encode(text)


def long_conversation(folder: Path, messages: int, system: bool) -> list[Tree]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"{i:04} " + "x" * (i % 7)} for i in range(messages)]
    opening = [{"role": "system", "content": "Be brief."}] if system else []
    return read_trees([write(folder / "d.jsonl", {"messages": opening + turns})])[0]


def for_ppo(trees: list[Tree], tokenizer: ChatTokenizer, folder: Path) -> Corpus:
    return tokenized(trees, Tokenization(DataNeeds("ppo", tokenizer, 96, 16)), folder)


@pytest.mark.parametrize("system", [False, True])
def test_skipping_old_messages_does_not_change_tokens_and_conversations(
    tmp_path: Path, byte_tokenizer: ChatTokenizer, system: bool
) -> None:
    trees = long_conversation(tmp_path, 60, system)
    corpus = for_ppo(trees, byte_tokenizer, tmp_path)
    assert len(corpus.prompts.ids) == 30
    for row, prompt in enumerate(trees[0].prompts):
        assert corpus.prompts.ids[row].tolist() == byte_tokenizer.render_prompt(prompt, 80).ids
        assert corpus.prompts.conversations[row] == prompt
    rendered = [byte_tokenizer.render_prompt(prompt, 80) for prompt in trees[0].prompts]
    # The only thread is truncated too.
    assert corpus.facts["dropped"] == sum(r.dropped > 0 for r in rendered) + 1


def test_the_tokenization_cost_is_linear(tmp_path: Path, encoding: str) -> None:
    def cost(messages: int) -> tuple[int, int]:
        tokenizer = CountingTokenizer(encoding)
        trees = long_conversation(tmp_path, messages, False)
        conversations = for_ppo(trees, tokenizer, tmp_path).prompts.conversations
        assert isinstance(conversations, StoredConversations)
        return tokenizer.encoded, len(conversations.rows.flat) + len(conversations.messages.flat)

    short, long = cost(100), cost(400)
    assert long[0] < 4.5 * short[0]  # quadratic cost would give 16
    assert long[1] < 4.5 * short[1]
