"""Helpers for the tests of readers: small files, rows in OASST's layouts, and checks of trees."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rlchat.conversation import Conversation
from rlchat.data.corpus import Corpus, corpus_of
from rlchat.data.forest import Tree
from rlchat.data.formats import ReadReport, read_trees
from rlchat.data.tokenizing import Tokenization, tokenize_trees
from rlchat.errors import UserError
from rlchat.utils.arrays import read_arrays

SAMPLES = Path(__file__).parents[1] / "data" / "samples"

GOOD_ROW = {"messages": [{"content": "Hi"}, {"content": "Hello!"}]}


def write(path: Path, *rows: Any) -> Path:
    """A JSONL file; rows of type bytes are written unchanged."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


class RowReader:
    """Reads rows, given one by one, from a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *rows: Any, **options: Any) -> tuple[list[Tree], ReadReport]:
        return read_trees([write(self.folder / "rows.jsonl", *rows)], **options)


def words(conversation: Conversation) -> str:
    """The conversation as text, for example ``u:Hi a:Hello``."""
    return " ".join(f"{message.role[0]}:{message.text}" for message in conversation.messages)


def threads_of(trees: list[Tree]) -> list[str]:
    return [words(thread) for tree in trees for thread in tree.threads]


def prompts_of(trees: list[Tree]) -> list[str]:
    return [words(prompt) for tree in trees for prompt in tree.prompts]


def node(message_id: str, role: str, *replies: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """An OASST message whose text is its id, with its replies nested."""
    return {"message_id": message_id, "role": role, "text": message_id, **fields, "replies": list(replies)}


def tree_row(prompt: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"message_tree_id": prompt["message_id"], "tree_state": "ready_for_export", "prompt": prompt, **fields}


def root(*replies: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return node("q1", "prompter", *replies, **{"lang": "en", "review_result": True, **fields})


def flat_rows(row: dict[str, Any], parent_id: str | None = None, tree_id: str = "q1") -> list[dict[str, Any]]:
    """The rows of the messages layout, parents first."""
    mine = {key: value for key, value in row.items() if key != "replies"}
    mine |= {"parent_id": parent_id, "message_tree_id": tree_id, "tree_state": "ready_for_export"}
    return [mine, *(flat for reply in row["replies"] for flat in flat_rows(reply, row["message_id"], tree_id))]


def tokenized(trees: Sequence[Tree], how: Tokenization, folder: Path, processes: int = 0) -> Corpus:
    """The corpus of ``trees``, whose arrays are in a new folder in ``folder``."""
    arrays = Path(tempfile.mkdtemp(prefix="arrays-", dir=folder))
    tokenize_trees(trees, how, arrays, processes=processes)
    return corpus_of(*read_arrays(arrays))


# q1 ┬ a1 (rank 1) ┬ q2 ─ a3
#    │             └ q3
#    └ a2 (rank 0) ─ q4
SMALL = root(
    node("a1", "assistant", node("q2", "prompter", node("a3", "assistant")), node("q3", "prompter"), rank=1),
    node("a2", "assistant", node("q4", "prompter"), rank=0),
)


def check_invariants(trees: list[Tree]) -> None:
    assert len({tree.id for tree in trees}) == len(trees)
    for tree in trees:
        assert tree.threads or tree.prompts
        for thread in tree.threads:
            assert thread.messages[-1].role == "assistant"
        for prompt in tree.prompts:
            assert prompt.is_prompt or (not prompt.messages and len(prompt.references) == 1)
            assert all(reply.role == "assistant" and reply.text.strip() for reply in prompt.references)
        for conversation in tree.threads + tree.prompts:
            assert conversation.tree_id == tree.id
            for message in conversation.messages + conversation.references:
                message.text.encode()
                assert message.text.strip()
                assert message.quality is None or 0 <= message.quality <= 1


def check_bad_line(read: RowReader, row: Any, reason: str, **options: Any) -> None:
    """Checks that ``row`` stops the reading with an error that names its line, or is counted."""
    with pytest.raises(UserError, match=rf"rows\.jsonl:3: .*{reason}.*; fix the line or set data\.on_bad_line=skip"):
        read(GOOD_ROW, b"", row, **options)
    trees, report = read(GOOD_ROW, row, {"prompt": "Bye"}, on_bad_line="skip", **options)
    assert prompts_of(trees) == ["u:Hi", "u:Bye"]
    assert (report.lines, report.bad_lines) == (3, 1)
    assert "rows.jsonl:2: " in report.bad_line_examples[0]
