"""The readers of data files: every format by hand, every way to be wrong, and the figures of real files."""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlchat import formats
from rlchat.conversation import Check, Conversation, Message
from rlchat.errors import UserError
from rlchat.formats import ReadReport, Tree, ranked_pairs, read_trees

DATA = Path(__file__).parents[1].parent / "shared" / "data"
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="the sample data sets (shared/data) are not beside the checkout"
)

GOOD_ROW = {"messages": [{"content": "Hi"}, {"content": "Hello!"}]}


def write(path: Path, *rows: Any) -> Path:
    """A JSONL file; a row that is bytes goes in as it is."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


@pytest.fixture
def read(tmp_path: Path) -> Any:
    def read(*rows: Any, **options: Any) -> tuple[list[Tree], ReadReport]:
        return read_trees([write(tmp_path / "rows.jsonl", *rows)], **options)

    return read


def words(conversation: Conversation) -> str:
    """``u:Hi a:Hello``: who said what."""
    return " ".join(f"{message.role[0]}:{message.text}" for message in conversation.messages)


def threads_of(trees: list[Tree]) -> list[str]:
    return [words(thread) for tree in trees for thread in tree.threads]


def prompts_of(trees: list[Tree]) -> list[str]:
    return [words(prompt) for tree in trees for prompt in tree.prompts]


def node(message_id: str, role: str, *replies: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """An OASST message that says its own id, with its replies nested."""
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


# q1 ┬ a1 (rank 1) ┬ q2 ─ a3
#    │             └ q3
#    └ a2 (rank 0) ─ q4
SMALL = root(
    node("a1", "assistant", node("q2", "prompter", node("a3", "assistant")), node("q3", "prompter"), rank=1),
    node("a2", "assistant", node("q4", "prompter"), rank=0),
)


# -- OASST --


def check_small(trees: list[Tree]) -> None:
    (tree,) = trees
    assert tree.id == "q1"
    # a1 is the end of a thread cut at q3, but it is already the beginning of the thread that ends on a3.
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


def test_oasst_tree(read: Any) -> None:
    trees, report = read(tree_row(SMALL))
    check_small(trees)
    assert (report.lines, report.trees, report.threads, report.prompts) == (1, 1, 2, 4)
    assert not report.dropped


def test_oasst_messages_in_any_order(read: Any) -> None:
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


def test_oasst_message_that_nests_its_replies(read: Any) -> None:
    """The layout of the official sample's messages file: no tree id, no tree state."""
    trees, _ = read({**SMALL, "parent_id": None})
    check_small(trees)


def test_oasst_both_layouts_of_one_tree_are_read_once(read: Any) -> None:
    trees, report = read(tree_row(SMALL), *flat_rows(SMALL))
    check_small(trees)
    assert report.dropped == {"duplicate messages": 7}


def test_oasst_labels_of_both_layouts_and_none(read: Any) -> None:
    nested = {"spam": {"value": 0.0, "count": 3}, "quality": {"value": 0.75, "count": 3}}
    flat = {"name": ["spam", "quality"], "value": [0.0, 0.25], "count": [3, 3]}
    without = {"name": ["spam"], "value": [0.0], "count": [3]}
    labels = [nested, flat, without, None, {"spam": {"value": 0.0, "count": 3}}]
    replies = [node(f"a{i}", "assistant", labels=label) for i, label in enumerate(labels)]
    ((tree,), _) = read(tree_row(root(*replies)))
    assert [reply.quality for reply in tree.prompts[0].references] == [0.75, 0.25, None, None, None]
    assert tree.threads[0].messages[-1] == Message("assistant", "a0", quality=0.75)


def test_oasst_nulls_and_whole_floats(read: Any) -> None:
    null = dict.fromkeys(("rank", "labels", "emojis", "deleted", "synthetic", "lang", "model_name", "check"))
    rows = flat_rows(root(node("a1", "assistant", **null), node("a2", "assistant", **{**null, "rank": 1.0}), **null))
    ((tree,), _) = read(*rows)
    assert [reply.rank for reply in tree.prompts[0].references] == [None, 1]


def test_oasst_check(read: Any) -> None:
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
def test_oasst_selection_of_trees(read: Any, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=f"no usable conversation in .*rows.jsonl.*dropped 1 {reason}"):
        read(row)
    trees, report = read(row, GOOD_ROW)
    assert threads_of(trees) == ["u:Hi a:Hello!"]
    assert report.dropped == {reason: 1}


def test_oasst_language_is_the_prompts(read: Any) -> None:
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
def test_oasst_unusable_message_goes_with_what_hangs_below(read: Any, fields: dict[str, Any], reason: str) -> None:
    below = node("q2", "prompter", node("a3", "assistant"))
    trees, report = read(
        tree_row(root(node("a1", "assistant", below, rank=0, **fields), node("a2", "assistant", rank=1)))
    )
    assert threads_of(trees) == ["u:q1 a:a2"]
    assert prompts_of(trees) == ["u:q1"]
    assert [reply.text for reply in trees[0].prompts[0].references] == ["a2"]
    assert report.dropped == {reason: 1, "messages below a dropped one": 2}


def test_oasst_reply_stays_when_only_what_follows_it_was_deleted(read: Any) -> None:
    trees, _ = read(tree_row(root(node("a1", "assistant", node("q2", "prompter", deleted=True)))))
    assert threads_of(trees) == ["u:q1 a:a1"]


def test_oasst_keep_synthetic(read: Any) -> None:
    row = tree_row(root(node("a1", "assistant", synthetic=True), node("a2", "assistant", deleted=True)))
    assert threads_of(read(row, keep_synthetic=True)[0]) == ["u:q1 a:a1"]
    trees, report = read(row)
    assert (threads_of(trees), prompts_of(trees)) == ([], ["u:q1"])
    assert report.dropped == {"synthetic messages": 1, "deleted messages": 1}


def test_oasst_orphans_and_rings_are_counted(read: Any) -> None:
    ring = [
        {"message_id": "r1", "parent_id": "r2", "role": "prompter", "text": "x"},
        {"message_id": "r2", "parent_id": "r1", "role": "assistant", "text": "y"},
    ]
    orphan = {"message_id": "o", "parent_id": "gone", "role": "assistant", "text": "z"}
    trees, report = read(*ring, orphan, *flat_rows(SMALL))
    check_small(trees)
    assert report.dropped == {"messages that lead to no root": 3}


def test_oasst_endless_thread_is_cut(read: Any) -> None:
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


# -- other rows --


def test_messages_row_without_roles(read: Any) -> None:
    contents = [{"content": text} for text in ("Hi", "Hello!", "Bye", "See you", "Wait")]
    ((tree,), report) = read({"messages": contents, "quality": 0.5, "id": 7})
    assert threads_of([tree]) == ["u:Hi a:Hello! u:Bye a:See you"]
    assert prompts_of([tree]) == ["u:Hi", "u:Hi a:Hello! u:Bye", "u:Hi a:Hello! u:Bye a:See you u:Wait"]
    assert [prompt.references for prompt in tree.prompts] == [
        (Message("assistant", "Hello!", 0.5),),
        (Message("assistant", "See you", 0.5),),
        (),
    ]
    assert [message.quality for message in tree.threads[0].messages] == [None, 0.5, None, 0.5]
    assert {conversation.tree_id for conversation in tree.threads + tree.prompts} == {tree.id}
    assert (report.threads, report.prompts) == (1, 3)


def test_messages_row_with_roles_check_and_own_quality(read: Any) -> None:
    row = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "prompter", "content": "2 + 2?", "check": {"any_of": ["4", "four"]}},
            {"content": "5", "quality": 0.0},
            {"role": None, "content": "Sure?"},
            {"role": "assistant", "content": "4"},
        ],
        "quality": 1,
    }
    ((tree,), _) = read(row)
    assert threads_of([tree]) == ["s:Be brief. u:2 + 2? a:5 u:Sure? a:4"]
    assert [message.quality for message in tree.threads[0].messages] == [None, None, 0.0, None, 1.0]
    assert [prompt.check for prompt in tree.prompts] == [Check(("4", "four")), None]


def test_messages_row_with_only_a_user_message_is_a_prompt(read: Any) -> None:
    ((tree,), _) = read({"messages": [{"content": "Hi"}]})
    assert (threads_of([tree]), prompts_of([tree])) == ([], ["u:Hi"])


def test_text_row(read: Any) -> None:
    ((tree,), report) = read({"text": "A good answer.", "quality": 0.9})
    response = Message("assistant", "A good answer.", 0.9)
    assert tree.prompts == (Conversation((), references=(response,), tree_id=tree.id),)
    assert tree.threads == (Conversation((response,), tree_id=tree.id),)
    assert (report.prompts, report.responses) == (0, 1)


@pytest.mark.parametrize("prompt", ["Hi", [{"role": "user", "content": "Hi"}], [{"content": "Hi"}]])
def test_preference_pair(read: Any, prompt: Any) -> None:
    ((tree,), _) = read({"prompt": prompt, "chosen": "Hello!", "rejected": "What."})
    better, worse = Message("assistant", "Hello!", rank=0), Message("assistant", "What.", rank=1)
    assert tree.prompts == (Conversation((Message("user", "Hi"),), (better, worse), tree_id=tree.id),)
    assert threads_of([tree]) == ["u:Hi a:Hello!"]
    assert ranked_pairs(tree.prompts[0]) == [(better, worse)]


def test_prompt_row(read: Any) -> None:
    ((tree,), _) = read({"id": "koala_0", "prompt": "Name a colour.", "check": {"any_of": ["red"]}})
    assert tree.threads == ()
    assert tree.prompts == (Conversation((Message("user", "Name a colour."),), (), Check(("red",)), tree.id),)
    ((tree,), _) = read({"prompt": [{"content": "Hi"}, {"content": "Hello!"}, {"content": "Name a colour."}]})
    assert prompts_of([tree]) == ["u:Hi a:Hello! u:Name a colour."]


def test_hh_pair(read: Any) -> None:
    opening = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Any news?\n\nAssistant:"
    ((tree,), _) = read({"chosen": f"{opening} None.\n\nGood night.", "rejected": f"{opening} Go away."})
    assert prompts_of([tree]) == ["u:Hi a:Hello! u:Any news?"]
    assert threads_of([tree]) == ["u:Hi a:Hello! u:Any news? a:None.\n\nGood night."]
    assert [(better.text, worse.text) for better, worse in ranked_pairs(tree.prompts[0])] == [
        ("None.\n\nGood night.", "Go away.")
    ]


def test_hh_marker_said_twice_is_one_reply(read: Any) -> None:
    chosen = "\n\nHuman: Hi\n\nAssistant: Just a second.\n\nAssistant: Hello!"
    ((tree,), _) = read({"chosen": chosen, "rejected": "\n\nHuman: Hi\n\nAssistant: No."})
    assert [reply.text for reply in tree.prompts[0].references] == ["Just a second.\n\nHello!", "No."]


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("\n\nHuman: Hi\n\nAssistant: Yes", "\n\nHuman: Hi\n\nAssistant: Yes ", "identical pairs"),
        ("\n\nHuman: Hi\n\nAssistant:", "\n\nHuman: Hi\n\nAssistant: No", "pairs with an empty reply"),
        ("\n\nHuman: Hi", "\n\nHuman: Hi\n\nAssistant: No", "pairs that end on Human"),
        (
            "\n\nHuman: Hi\n\nAssistant: A\n\nHuman: B\n\nAssistant: C",
            "\n\nHuman: Hi\n\nAssistant: X\n\nHuman: B\n\nAssistant: D",
            "pairs that differ before the last reply",
        ),
        (
            "\n\nHuman:\n\nAssistant: A",
            "\n\nHuman:\n\nAssistant: B",
            "pairs with an empty turn in the prompt",
        ),
    ],
)
def test_unusable_hh_pairs_are_counted(read: Any, chosen: str, rejected: str, reason: str) -> None:
    _, report = read({"chosen": chosen, "rejected": rejected}, GOOD_ROW)
    assert report.dropped == {reason: 1}
    assert report.bad_lines == 0


def test_unusable_preference_pairs_are_counted(read: Any) -> None:
    rows = [{"prompt": "Hi", "chosen": "A", "rejected": "A"}, {"prompt": "Hi", "chosen": "A", "rejected": " "}]
    _, report = read(*rows, GOOD_ROW)
    assert report.dropped == {"identical pairs": 1, "pairs with an empty reply": 1}


# -- tree ids, merging, ranks --


def test_rows_that_open_alike_are_one_tree_wherever_they_stand(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    first = write(tmp_path / "a.jsonl", {"prompt": "Hi there"}, {"prompt": "Bye"})
    second = write(tmp_path / "elsewhere" / "b.jsonl", {"prompt": " hi\nthere", "chosen": "A", "rejected": "B"})
    ids = [tree.id for tree in read_trees([first])[0]]
    assert len(set(ids)) == 2
    assert [tree.id for tree in read_trees([second])[0]] == ids[:1]
    together, _ = read_trees([first, second])
    assert [tree.id for tree in together] == ids
    assert prompts_of(together) == ["u:Hi there", "u: hi\nthere", "u:Bye"]


def test_equal_rows_are_kept_once_and_unranked_replies_gathered(read: Any) -> None:
    def talk(reply: str, quality: float) -> dict[str, Any]:
        return {"messages": [{"content": "Hi"}, {"content": reply}], "quality": quality}

    ((tree,), report) = read(talk("Hello!", 1.0), talk("Hello!", 1.0), talk("What?", 0.0))
    assert threads_of([tree]) == ["u:Hi a:Hello!", "u:Hi a:What?"]
    (prompt,) = tree.prompts
    assert [(reply.text, reply.quality) for reply in prompt.references] == [("Hello!", 1.0), ("What?", 0.0)]
    assert report.dropped == {"duplicate threads": 1}


def test_ranks_of_different_rows_are_never_compared(read: Any) -> None:
    ((tree,), _) = read(
        {"prompt": "Hi", "chosen": "A", "rejected": "B"}, {"prompt": "Hi", "chosen": "B", "rejected": "C"}
    )
    pairs = [[(better.text, worse.text) for better, worse in ranked_pairs(prompt)] for prompt in tree.prompts]
    assert pairs == [[("A", "B")], [("B", "C")]]


def test_lone_responses_stay_apart(read: Any) -> None:
    trees, _ = read({"text": "A", "quality": 1.0}, {"text": "A", "quality": 0.0}, {"text": "B", "quality": 0.0})
    assert [len(tree.prompts) for tree in trees] == [2, 1]
    assert [prompt.references[0].quality for prompt in trees[0].prompts] == [1.0, 0.0]


def test_ranked_pairs() -> None:
    a, b, c = (Message("assistant", text, rank=rank) for text, rank in (("a", 2), ("b", 0), ("c", 1)))
    tie, unranked = Message("assistant", "tie", rank=1), Message("assistant", "unranked")
    prompt = Conversation((Message("user", "?"),), (a, unranked, b, c, tie))
    assert ranked_pairs(prompt) == [(b, c), (b, tie), (b, a), (c, a), (tie, a)]
    assert ranked_pairs(Conversation((Message("user", "?"),))) == []


# -- what is wrong with a line or a file --

LONE_SURROGATE = b'{"text": "\\ud800"}'
BAD_LINES: list[tuple[Any, str]] = [
    (b'{"messages": [', "not JSON"),
    (b"[" * 100_000, "not usable as JSON"),
    (b"9" * 5000, "not usable as JSON"),
    ([1, 2], "not a JSON object"),
    (b"null", "not a JSON object"),
    ({"question": "1 + 1?", "answer": "2"}, "no known format.*question"),
    ({}, "no known format"),
    (b'{"text": "\xff"}', "not UTF-8"),
    (b'{"text": "a\0b"}', "NUL"),
    ({"text": "a\0b"}, "NUL"),
    (LONE_SURROGATE, "lone surrogate"),
    ({"text": " "}, "text is empty"),
    ({"text": 3}, "text is not a string"),
    ({"text": "x" * 2000}, "longer than 1,000 bytes"),
    ({"text": "a", "quality": "good"}, "quality is not a number"),
    ({"text": "a", "quality": True}, "quality is not a number"),
    (b'{"text": "a", "quality": NaN}', "not in 0..1"),
    ({"text": "a", "quality": 7}, "not in 0..1"),
    ({"messages": []}, "messages is not a list with"),
    ({"messages": "Hi"}, "messages is not a list with"),
    ({"messages": ["Hi"]}, "a message is not an object"),
    ({"messages": [{"text": "Hi"}]}, "content is not a string"),
    ({"messages": [{"content": ""}]}, "content is empty"),
    ({"messages": [{"content": "Hi", "role": "narrator"}]}, "unknown role 'narrator'"),
    ({"messages": [{"content": "Hi", "role": "system"}]}, "no user or assistant message"),
    ({"messages": [{"content": "Hi", "check": {"any_of": "Paris"}}]}, "any_of is not of type list"),
    ({"messages": [{"content": "Hi", "check": {"any_of": []}}]}, "any_of is missing or empty"),
    ({"messages": [{"content": "Hi", "check": ["Paris"]}]}, "check is not an object"),
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt": 3}, "prompt is not a string"),
    ({"prompt": []}, "messages is not a list with"),
    ({"prompt": [{"content": "Hi"}, {"content": "Hello!"}]}, "prompt does not end on a user message"),
    ({"prompt": "Hi", "chosen": "A"}, "chosen and rejected belong together"),
    ({"prompt": "Hi", "chosen": ["A"], "rejected": "B"}, "chosen is not a string"),
    ({"chosen": "Hi", "rejected": "Ho"}, "chosen does not begin with Human"),
    ({"chosen": "\n\nAssistant: Hi", "rejected": "\n\nAssistant: Ho"}, "share no Human turn"),
    (tree_row(root(node("a1", "bot"))), "unknown role 'bot'"),
    (tree_row(root({"message_id": "a1", "text": "x"})), "without role"),
    (tree_row(root(node("a1", "assistant", text=None))), "text is not a string"),
    (tree_row(root(node("a1", "assistant", rank=-1))), "rank is not a whole number"),
    (tree_row(root(node("a1", "assistant", rank=0.5))), "rank is not a whole number"),
    (tree_row(root(node("a1", "assistant", deleted="no"))), "deleted is not of type bool"),
    (tree_row(root(node("a1", "assistant", labels={"name": ["quality"], "value": []}))), "one value for each name"),
    (tree_row({**root(), "replies": "none"}), "replies is not of type list"),
    (tree_row({**root(), "replies": ["none"]}), "a reply is not an object"),
    ({"prompt": {"text": "Hi", "role": "prompter"}}, "without message_id"),
    ({"parent_id": None, "text": "Hi", "role": "prompter"}, "without message_id"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_LINES)
def test_bad_line_stops_or_is_counted(read: Any, row: Any, reason: str) -> None:
    # The bound is far from the other rows' length, but below the two long ones made to exceed a parser's limits.
    limit = 1000 if reason.startswith("longer") else 8_000_000
    with pytest.raises(UserError, match=rf"rows\.jsonl:3: .*{reason}.*; mend the line or set data\.on_bad_line=skip"):
        read(GOOD_ROW, b"", row, max_line_bytes=limit)
    trees, report = read(GOOD_ROW, row, {"prompt": "Bye"}, on_bad_line="skip", max_line_bytes=limit)
    assert prompts_of(trees) == ["u:Hi", "u:Bye"]
    assert (report.lines, report.bad_lines) == (3, 1)
    assert "rows.jsonl:2: " in report.bad_line_examples[0]


def test_a_line_may_be_as_long_as_the_limit(tmp_path: Path) -> None:
    line = json.dumps({"text": "x" * 100}).encode()
    path = tmp_path / "rows.jsonl"
    for ending in (b"", b"\n"):
        path.write_bytes(line + ending)
        assert len(read_trees([path], max_line_bytes=len(line))[0]) == 1
        with pytest.raises(UserError, match="longer than"):
            read_trees([path], max_line_bytes=len(line) - 2)


def test_only_the_first_bad_lines_are_told(read: Any) -> None:
    _, report = read(GOOD_ROW, *[b"{"] * 30, on_bad_line="skip")
    assert report.bad_lines == 30
    assert len(report.bad_line_examples) == 5
    assert "skipped 30 bad lines" in report.summary()
    assert "\n" not in report.summary()


def test_gzip_by_content_byte_order_mark_and_windows_lines(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + json.dumps(GOOD_ROW).encode() + b"\r\n\r\n" + json.dumps({"prompt": "Bye"}).encode()
    (tmp_path / "plain.gz").write_bytes(content)
    (tmp_path / "zipped.jsonl").write_bytes(gzip.compress(content))
    for name in ("plain.gz", "zipped.jsonl"):
        trees, report = read_trees([tmp_path / name])
        assert prompts_of(trees) == ["u:Hi", "u:Bye"]
        assert report.lines == 2


@pytest.mark.parametrize("on_bad_line", ["error", "skip"])
def test_broken_files(tmp_path: Path, on_bad_line: Any) -> None:
    good = write(tmp_path / "good.jsonl", GOOD_ROW)
    zipped = gzip.compress(b"\n".join([json.dumps(GOOD_ROW).encode()] * 1000))
    truncated, damaged = tmp_path / "truncated.gz", tmp_path / "damaged.gz"
    truncated.write_bytes(zipped[:-20])
    damaged.write_bytes(zipped[:10] + bytes(byte ^ 0xFF for byte in zipped[10:]))
    for path, reason in (
        (tmp_path / "missing.jsonl", "no such data file: .*missing.jsonl"),
        (tmp_path, "is a directory"),
        (truncated, "truncated.gz is a broken or truncated gzip"),
        (damaged, "damaged.gz is a broken or truncated gzip"),
        (Path("nul\0byte"), "cannot read"),
    ):
        with pytest.raises(UserError, match=reason):
            read_trees([good, path], on_bad_line=on_bad_line)
    with pytest.raises(UserError, match="no data file is given"):
        read_trees([])
    with pytest.raises(UserError, match=r"no usable conversation in .*empty.jsonl"):
        read_trees([write(tmp_path / "empty.jsonl", b"")])


def test_long_line_is_not_read_into_memory(tmp_path: Path) -> None:
    """200 MB of one line, which gzip packs into 200 kB, under a peak of 40 MB."""
    import tracemalloc

    path = tmp_path / "long.jsonl"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(200):
            file.write(b"x" * 1_000_000)
        file.write(b"\n" + json.dumps(GOOD_ROW).encode())
    tracemalloc.start()
    trees, report = read_trees([path], on_bad_line="skip")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (threads_of(trees), report.bad_lines) == (["u:Hi a:Hello!"], 1)
    assert peak < 40_000_000


def test_progress_bar_shows_only_when_reading_takes_long(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "rows.jsonl", *[GOOD_ROW] * 50)
    monkeypatch.setenv("FORCE_COLOR", "1")
    read_trees([path])
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(formats, "_SECONDS_BEFORE_PROGRESS", 0.0)
    read_trees([path], progress=False)
    assert capsys.readouterr().err == ""
    read_trees([path])
    out, err = capsys.readouterr()
    assert out == ""
    assert "reading" in err


# -- properties --

KEYS = [
    "messages",
    "content",
    "role",
    "quality",
    "check",
    "any_of",
    "none_of",
    "prompt",
    "chosen",
    "rejected",
    "text",
    "message_id",
    "parent_id",
    "message_tree_id",
    "tree_state",
    "replies",
    "labels",
    "name",
    "value",
    "rank",
    "lang",
    "deleted",
    "synthetic",
    "review_result",
]
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-2, 3)
    | st.floats()
    | st.sampled_from(["", "a", "b", "prompter", "assistant", "system", "en", "quality", "ready_for_export", "\ud800"])
    | st.sampled_from(["\n\nHuman: Hi\n\nAssistant: A", "\n\nHuman: Hi\n\nAssistant:", "\n\nHuman: Hi"])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=6),
    max_leaves=12,
)
json_lines = st.dictionaries(st.sampled_from(KEYS), values, max_size=8).map(lambda row: json.dumps(row).encode())
# A damaged copy of good rows reaches further into the readers than bytes drawn at random.
good_lines = st.sampled_from([json.dumps(row).encode() for row in (GOOD_ROW, tree_row(SMALL), *flat_rows(SMALL))])
damaged_lines = st.tuples(good_lines, st.integers(0, 80), st.binary(max_size=4)).map(
    lambda cut: cut[0][: cut[1]] + cut[2] + cut[0][cut[1] + len(cut[2]) :]
)
lines = st.one_of(st.binary(max_size=60), json_lines, good_lines, damaged_lines)
quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@quick
@given(content=st.binary(max_size=200) | st.lists(lines, max_size=6).map(b"\n".join), zipped=st.booleans())
def test_no_bytes_raise_anything_but_a_user_error(content: bytes, zipped: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows")
        path.write_bytes(gzip.compress(content) if zipped else content)
        for options in ({}, {"on_bad_line": "skip", "lang": None, "keep_synthetic": True, "max_line_bytes": 100}):
            try:
                trees, _ = read_trees([path], **options)  # type: ignore[arg-type]
            except UserError as error:
                str(error).encode()
            else:
                assert trees
                check_invariants(trees)


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


@quick
@given(before=st.lists(lines, max_size=5), after=st.lists(lines, max_size=5))
def test_a_good_row_survives_among_garbage(before: list[bytes], after: list[bytes]) -> None:
    good = json.dumps({"messages": [{"content": "Is it me?"}, {"content": "It is."}]}).encode()
    content = b"\n".join([*before, good, *after])
    if content.startswith(b"\x1f\x8b"):  # that would be a broken gzip file, which cannot be read on
        content = b"\n" + content
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows")
        path.write_bytes(content)
        trees, _ = read_trees([path], on_bad_line="skip")
    check_invariants(trees)
    assert "u:Is it me? a:It is." in threads_of(trees)


# -- real files --


@needs_data
def test_oasst1_validation() -> None:
    """2,022 messages. Of 779 user messages, one hangs below a message that is not there, and 12 more are deleted or
    below a deleted one; of 1,026 pairs among ranked replies, 4 have a deleted one.
    """
    trees, report = read_trees([DATA / "oasst1-validation" / "en-validation.messages.jsonl.gz"])
    assert (report.lines, report.trees, report.threads, report.prompts) == (2022, 188, 928, 766)
    assert report.dropped == {
        "deleted messages": 25,
        "messages below a dropped one": 15,
        "messages that lead to no root": 3,
    }
    prompts = [prompt for tree in trees for prompt in tree.prompts]
    assert sum(len(ranked_pairs(prompt)) for prompt in prompts) == 1022
    check_invariants(trees)


@needs_data
def test_oasst1_validation_before_the_deleted_messages_go(tmp_path: Path) -> None:
    """The figures in the notes on the data: 188 trees, 778 prompts, 1,026 ranked pairs, and 704 threads that end on an
    assistant message to which nobody wrote anything (a thread cut at a trailing user message is not among them).
    """
    with gzip.open(DATA / "oasst1-validation" / "en-validation.messages.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [{**json.loads(line), "deleted": False} for line in file]
    trees, report = read_trees([write(tmp_path / "undeleted.jsonl", *rows)])
    prompts = [prompt for tree in trees for prompt in tree.prompts]
    assert (report.trees, report.prompts) == (188, 778)
    assert sum(len(ranked_pairs(prompt)) for prompt in prompts) == 1026
    continued = {prompt.messages[:-1] for prompt in prompts}
    assert sum(thread.messages not in continued for tree in trees for thread in tree.threads) == 704


@needs_data
@pytest.mark.parametrize("layout", ["trees", "messages"])
def test_oasst_sample(layout: str) -> None:
    """100 trees, 1,167 messages; 5 trees (22 messages) are synthetic from the root down."""
    path = DATA / "oasst-sample-100" / f"en_100.{layout}.jsonl.gz"
    trees, report = read_trees([path])
    assert (report.trees, report.prompts) == (95, 475)
    assert report.dropped == {"synthetic messages": 5, "messages below a dropped one": 17}
    everything, report = read_trees([path], keep_synthetic=True)
    assert (report.trees, report.prompts, report.dropped) == (100, 480, {})
    assert {tree.id for tree in trees} < {tree.id for tree in everything}


@needs_data
def test_oasst_sample_is_the_same_in_both_layouts() -> None:
    folder = DATA / "oasst-sample-100"
    assert read_trees([folder / "en_100.trees.jsonl.gz"])[0] == read_trees([folder / "en_100.messages.jsonl.gz"])[0]


@needs_data
@pytest.mark.parametrize(
    ("name", "pairs", "dropped"),
    [
        (
            "helpful-base",
            2348,
            {"pairs with an empty reply": 3, "identical pairs": 2, "pairs with an empty turn in the prompt": 1},
        ),
        ("harmless-base", 2308, {"pairs with an empty reply": 4}),
    ],
)
def test_hh_rlhf(name: str, pairs: int, dropped: dict[str, int]) -> None:
    trees, report = read_trees([DATA / "hh-rlhf" / f"{name}.test.jsonl.gz"])
    assert report.dropped == dropped
    prompts = [prompt for tree in trees for prompt in tree.prompts]
    assert [len(ranked_pairs(prompt)) for prompt in prompts] == [1] * pairs
    assert report.lines == pairs + sum(dropped.values())


@needs_data
def test_sgd_and_koala_together() -> None:
    trees, report = read_trees([DATA / "sgd" / "dev.jsonl.gz", DATA / "koala" / "koala_test_set.jsonl"])
    assert (report.lines, report.threads) == (2098 + 180, 2098)
    assert report.dropped == {}
    assert sum(not tree.threads for tree in trees) == 180
    check_invariants(trees)
