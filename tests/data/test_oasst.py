"""OASST's layouts: links, selection, labels, and the counts of sample files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.data_rows import (
    GOOD_ROW,
    SAMPLES,
    SMALL,
    RowReader,
    check_bad_line,
    check_invariants,
    flat_rows,
    node,
    prompts_of,
    root,
    threads_of,
    tree_row,
    words,
    write,
)

from rlchat.conversation import Check, Message
from rlchat.data.forest import Tree
from rlchat.data.formats import ranked_pairs, read_trees
from rlchat.errors import UserError


@pytest.fixture
def read(tmp_path: Path) -> RowReader:
    return RowReader(tmp_path)


def check_small(trees: list[Tree]) -> None:
    (tree,) = trees
    assert tree.id == "q1"
    # a1 is the end of a thread cut at q3, but it is already the beginning of the thread that ends with a3.
    assert sorted(threads_of(trees)) == ["u:q1 a:a1 u:q2 a:a3", "u:q1 a:a2"]
    references = {words(prompt): [(reply.text, reply.rank) for reply in prompt.references] for prompt in tree.prompts}
    assert references == {
        "u:q1": [("a1", 1), ("a2", 0)],
        "u:q1 a:a1 u:q2": [("a3", None)],
        "u:q1 a:a1 u:q3": [],
        "u:q1 a:a2 u:q4": [],
    }
    assert {conversation.tree_id for conversation in tree.threads + tree.prompts} == {"q1"}
    assert not any(thread.references or thread.check for thread in tree.threads)


def test_oasst_tree(read: RowReader) -> None:
    trees, report = read(tree_row(SMALL))
    check_small(trees)
    assert (report.lines, report.trees, report.threads, report.prompts) == (1, 1, 2, 4)
    assert not report.dropped


def test_oasst_messages_in_any_order(read: RowReader) -> None:
    rows = flat_rows(SMALL)
    trees, _ = read(*rows)
    check_small(trees)
    other = flat_rows(node("z1", "prompter", node("z2", "assistant")), tree_id="z1")
    shuffled = [rows[4], other[1], rows[2], rows[1], rows[0], other[0], rows[6], rows[5], rows[3]]
    trees, report = read(*shuffled)
    by_id = {tree.id: tree for tree in trees}
    assert threads_of([by_id["z1"]]) == ["u:z1 a:z2"]
    assert sorted(threads_of([by_id["q1"]])) == ["u:q1 a:a1 u:q2 a:a3", "u:q1 a:a2"]
    assert (report.lines, report.dropped) == (9, {})


def test_oasst_messages_across_files(tmp_path: Path) -> None:
    rows = flat_rows(SMALL)
    files = [write(tmp_path / "1.jsonl", *rows[:3]), write(tmp_path / "2.jsonl", *rows[3:])]
    check_small(read_trees(files)[0])


def test_oasst_message_that_nests_its_replies(read: RowReader) -> None:
    """The layout of the official sample's messages file: no tree id, no tree state."""
    trees, _ = read({**SMALL, "parent_id": None})
    check_small(trees)


def test_oasst_both_layouts_of_one_tree_are_read_once(read: RowReader) -> None:
    trees, report = read(tree_row(SMALL), *flat_rows(SMALL))
    check_small(trees)
    assert report.dropped == {"duplicate messages": 7}


def test_oasst_labels_in_both_layouts_or_absent(read: RowReader) -> None:
    nested = {"spam": {"value": 0.0, "count": 3}, "quality": {"value": 0.75, "count": 3}}
    flat = {"name": ["spam", "quality"], "value": [0.0, 0.25], "count": [3, 3]}
    without = {"name": ["spam"], "value": [0.0], "count": [3]}
    labels = [nested, flat, without, None, {"spam": {"value": 0.0, "count": 3}}]
    replies = [node(f"a{i}", "assistant", labels=label) for i, label in enumerate(labels)]
    ((tree,), _) = read(tree_row(root(*replies)))
    assert [reply.quality for reply in tree.prompts[0].references] == [0.75, 0.25, None, None, None]
    assert tree.threads[0].messages[-1] == Message("assistant", "a0", quality=0.75)


def test_oasst_nulls_and_whole_floats(read: RowReader) -> None:
    null = dict.fromkeys(("rank", "labels", "emojis", "deleted", "synthetic", "lang", "model_name", "check"))
    rows = flat_rows(root(node("a1", "assistant", **null), node("a2", "assistant", **{**null, "rank": 1.0}), **null))
    ((tree,), _) = read(*rows)
    assert [reply.rank for reply in tree.prompts[0].references] == [None, 1]


def test_oasst_check(read: RowReader) -> None:
    row = tree_row(root(node("a1", "assistant"), check={"any_of": ["Paris"], "none_of": ["Rome"]}))
    ((tree,), _) = read(row)
    assert tree.prompts[0].check == Check(("Paris",), ("Rome",))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (tree_row(SMALL, tree_state="growing"), "trees not ready for export"),
        (tree_row(SMALL, tree_state=None), "trees not ready for export"),
        (
            tree_row(root(node("a1", "assistant"), review_result=False)),
            "trees whose prompt was not reviewed positively",
        ),
        (tree_row(root(node("a1", "assistant"), review_result=None)), "trees whose prompt was not reviewed positively"),
        (tree_row(root(node("a1", "assistant"), lang="de")), "trees in another language"),
    ],
)
def test_oasst_selection_of_trees(read: RowReader, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=f"no usable conversation in .*rows.jsonl.*dropped 1 {reason}"):
        read(row)
    trees, report = read(row, GOOD_ROW)
    assert threads_of(trees) == ["u:Hi a:Hello!"]
    assert report.dropped == {reason: 1}


def test_oasst_language_is_that_of_the_prompt(read: RowReader) -> None:
    german = tree_row(root(node("a1", "assistant", lang="en"), lang="de"))
    assert threads_of(read(german, lang="de")[0]) == ["u:q1 a:a1"]
    assert threads_of(read(german, lang=None)[0]) == ["u:q1 a:a1"]
    assert threads_of(read(tree_row(root(node("a1", "assistant"), lang=None)))[0]) == ["u:q1 a:a1"]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"deleted": True}, "deleted messages"),
        ({"synthetic": True}, "synthetic messages"),
        ({"text": " \n"}, "empty messages"),
    ],
)
def test_oasst_unusable_message_is_dropped_with_all_replies(
    read: RowReader, fields: dict[str, Any], reason: str
) -> None:
    below = node("q2", "prompter", node("a3", "assistant"))
    trees, report = read(
        tree_row(root(node("a1", "assistant", below, rank=0, **fields), node("a2", "assistant", rank=1)))
    )
    assert threads_of(trees) == ["u:q1 a:a2"]
    assert prompts_of(trees) == ["u:q1"]
    assert [reply.text for reply in trees[0].prompts[0].references] == ["a2"]
    assert report.dropped == {reason: 1, "messages below a dropped one": 2}


def test_oasst_reply_is_kept_if_only_later_messages_were_deleted(read: RowReader) -> None:
    trees, _ = read(tree_row(root(node("a1", "assistant", node("q2", "prompter", deleted=True)))))
    assert threads_of(trees) == ["u:q1 a:a1"]


def test_oasst_keep_synthetic(read: RowReader) -> None:
    row = tree_row(root(node("a1", "assistant", synthetic=True), node("a2", "assistant", deleted=True)))
    assert threads_of(read(row, keep_synthetic=True)[0]) == ["u:q1 a:a1"]
    trees, report = read(row)
    assert (threads_of(trees), prompts_of(trees)) == ([], ["u:q1"])
    assert report.dropped == {"synthetic messages": 1, "deleted messages": 1}


def test_oasst_orphans_and_cycles_are_counted(read: RowReader) -> None:
    ring = [
        {"message_id": "r1", "parent_id": "r2", "role": "prompter", "text": "x"},
        {"message_id": "r2", "parent_id": "r1", "role": "assistant", "text": "y"},
    ]
    orphan = {"message_id": "o", "parent_id": "gone", "role": "assistant", "text": "z"}
    trees, report = read(*ring, orphan, *flat_rows(SMALL))
    check_small(trees)
    assert report.dropped == {"messages that lead to no root": 3}


def test_oasst_too_long_thread_is_truncated(read: RowReader) -> None:
    rows = [
        {
            "message_id": str(i),
            "parent_id": str(i - 1) if i else None,
            "text": "x",
            "role": ("prompter", "assistant")[i % 2],
        }
        for i in range(1300)
    ]
    trees, report = read(*rows)
    assert [len(thread.messages) for thread in trees[0].threads] == [1000]
    assert report.dropped == {"messages nested too deep": 1, "messages below a dropped one": 299}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (tree_row(root(node("a1", "bot"))), "unknown role 'bot'"),
        (tree_row(root({"message_id": "a1", "text": "x"})), "without role"),
        (tree_row(root(node("a1", "assistant", text=None))), "text is not a string"),
        (tree_row(root(node("a1", "assistant", rank=-1))), "rank is not an integer"),
        (tree_row(root(node("a1", "assistant", rank=0.5))), "rank is not an integer"),
        (tree_row(root(node("a1", "assistant", deleted="no"))), "deleted is not of type bool"),
        (tree_row(root(node("a1", "assistant", labels={"name": ["quality"], "value": []}))), "one value for each name"),
        (tree_row({**root(), "replies": "none"}), "replies is not of type list"),
        (tree_row({**root(), "replies": ["none"]}), "a reply is not an object"),
        ({"prompt": {"text": "Hi", "role": "prompter"}}, "without message_id"),
        ({"parent_id": None, "text": "Hi", "role": "prompter"}, "without message_id"),
    ],
)
def test_a_bad_line_stops_the_run_or_is_counted(read: RowReader, row: Any, reason: str) -> None:
    check_bad_line(read, row, reason)


# -- sample files: 44 trees in both layouts, see samples/README.md --

DELETED = {"deleted messages": 1, "messages below a dropped one": 1}


def summary(paths: list[Path], **options: Any) -> tuple[tuple[int, int, int, int, int], dict[str, int]]:
    """Lines, trees, threads, prompts, ranked pairs; what was dropped."""
    trees, report = read_trees(paths, **options)
    check_invariants(trees)
    pairs = sum(len(ranked_pairs(prompt)) for tree in trees for prompt in tree.prompts)
    return (report.lines, report.trees, report.threads, report.prompts, pairs), report.dropped


@pytest.mark.parametrize(("layout", "lines"), [("messages", 218), ("trees", 44)])
def test_oasst_sample(layout: str, lines: int) -> None:
    """Forty trees have two prompts, two threads and one ranked pair each.

    In addition: one whose second response is deleted (2 prompts, 1 thread), a synthetic one, a prompt without a
    response, and one with three ranked responses (2 prompts, 3 threads, 3 pairs).
    """
    path = SAMPLES / f"oasst.{layout}.jsonl.gz"
    synthetic = {"synthetic messages": 1, "deleted messages": 1, "messages below a dropped one": 1 + 4}
    assert summary([path]) == ((lines, 43, 84, 85, 43), synthetic)
    assert summary([path], keep_synthetic=True) == ((lines, 44, 86, 87, 44), DELETED)


def test_messages_without_a_root_are_dropped(tmp_path: Path) -> None:
    with gzip.open(SAMPLES / "oasst.messages.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    orphan = {**rows[1], "message_id": "orphan", "parent_id": "nowhere"}
    path = write(tmp_path / "more.jsonl", *rows, orphan)
    counts, dropped = summary([path], keep_synthetic=True)
    assert counts == (219, 44, 86, 87, 44)
    assert dropped == {**DELETED, "messages that lead to no root": 1}


def test_a_deleted_message_is_dropped_with_everything_below_it(tmp_path: Path) -> None:
    """Without the deletion, the tree has a pair, and a thread up to its last user message, which is a prompt."""
    with gzip.open(SAMPLES / "oasst.messages.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [{**json.loads(line), "deleted": False} for line in file]
    path = write(tmp_path / "undeleted.jsonl", *rows)
    assert summary([path], keep_synthetic=True) == ((218, 44, 87, 88, 45), {})


def test_oasst_sample_is_the_same_in_both_layouts() -> None:
    messages, trees = (read_trees([SAMPLES / f"oasst.{layout}.jsonl.gz"])[0] for layout in ("messages", "trees"))
    assert messages == trees
