"""Files of any format: merging of trees, prompts for prediction, and the counts of sample files."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Callable
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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlchat.conversation import Check, Conversation, Message
from rlchat.data.formats import ranked_pairs, read_prompts, read_trees
from rlchat.errors import UserError


@pytest.fixture
def read(tmp_path: Path) -> RowReader:
    return RowReader(tmp_path)


# -- tree ids, merging, ranks --


def test_rows_with_the_same_first_message_are_one_tree(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    first = write(tmp_path / "a.jsonl", {"prompt": "Hi there"}, {"prompt": "Bye"})
    second = write(tmp_path / "elsewhere" / "b.jsonl", {"prompt": " hi\nthere", "chosen": "A", "rejected": "B"})
    ids = [tree.id for tree in read_trees([first])[0]]
    assert len(set(ids)) == 2
    assert [tree.id for tree in read_trees([second])[0]] == ids[:1]
    together, _ = read_trees([first, second])
    assert [tree.id for tree in together] == ids
    assert prompts_of(together) == ["u:Hi there", "u: hi\nthere", "u:Bye"]


def test_equal_rows_are_kept_once_and_unranked_responses_are_collected(read: RowReader) -> None:
    def talk(reply: str, quality: float) -> dict[str, Any]:
        return {"messages": [{"content": "Hi"}, {"content": reply}], "quality": quality}

    ((tree,), report) = read(talk("Hello!", 1.0), talk("Hello!", 1.0), talk("What?", 0.0))
    assert threads_of([tree]) == ["u:Hi a:Hello!", "u:Hi a:What?"]
    (prompt,) = tree.prompts
    assert [(reply.text, reply.quality) for reply in prompt.references] == [("Hello!", 1.0), ("What?", 0.0)]
    assert report.dropped == {"duplicate threads": 1}


def test_ranks_of_different_rows_are_never_compared(read: RowReader) -> None:
    ((tree,), _) = read(
        {"prompt": "Hi", "chosen": "A", "rejected": "B"}, {"prompt": "Hi", "chosen": "B", "rejected": "C"}
    )
    pairs = [[(better.text, worse.text) for better, worse in ranked_pairs(prompt)] for prompt in tree.prompts]
    assert pairs == [[("A", "B")], [("B", "C")]]


def test_responses_without_a_prompt_are_not_merged(read: RowReader) -> None:
    trees, _ = read({"text": "A", "quality": 1.0}, {"text": "A", "quality": 0.0}, {"text": "B", "quality": 0.0})
    assert [len(tree.prompts) for tree in trees] == [2, 1]
    assert [prompt.references[0].quality for prompt in trees[0].prompts] == [1.0, 0.0]


def test_ranked_pairs() -> None:
    a, b, c = (Message("assistant", text, rank=rank) for text, rank in (("a", 2), ("b", 0), ("c", 1)))
    tie, unranked = Message("assistant", "tie", rank=1), Message("assistant", "unranked")
    prompt = Conversation((Message("user", "?"),), (a, unranked, b, c, tie))
    assert ranked_pairs(prompt) == [(b, c), (b, tie), (b, a), (c, a), (tie, a)]
    assert ranked_pairs(Conversation((Message("user", "?"),))) == []


# -- invalid lines --


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "1 + 1?", "answer": "2"}, "no known format.*question"),
        ({}, "no known format"),
        ({"prompt": "Hi", "chosen": "A"}, "chosen and rejected are both required"),
    ],
)
def test_a_row_of_unknown_format_stops_the_run_or_is_counted(read: RowReader, row: Any, reason: str) -> None:
    check_bad_line(read, row, reason)


def test_only_the_first_bad_lines_are_reported(read: RowReader) -> None:
    _, report = read(GOOD_ROW, *[b"{"] * 30, on_bad_line="skip")
    assert report.bad_lines == 30
    assert len(report.bad_line_examples) == 5
    assert "skipped 30 bad lines" in report.summary()
    assert "\n" not in report.summary()


def test_line_longer_than_the_limit_is_counted(read: RowReader) -> None:
    check_bad_line(read, {"text": "x" * 2000}, "the line is longer than 1,000 bytes", max_line_bytes=1000)


def test_files_without_a_conversation(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no data file is specified"):
        read_trees([])
    with pytest.raises(UserError, match=r"no usable conversation in .*empty.jsonl"):
        read_trees([write(tmp_path / "empty.jsonl", b"")])


# -- prompts for prediction --


@pytest.fixture
def asked(tmp_path: Path) -> Callable[..., list[str]]:
    def asked(*rows: Any, **options: Any) -> list[str]:
        return [words(prompt) for prompt in read_prompts(write(tmp_path / "rows.jsonl", *rows), **options)]

    return asked


def test_there_is_one_prompt_per_row_in_the_order_of_the_file(asked: Any) -> None:
    talk = {"messages": [{"content": text} for text in ("Hi", "Hello!", "Any news?", "None.")]}
    hh_opening = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Who?\n\nAssistant:"
    assert asked(
        {"prompt": "Bye"},
        talk,
        {"prompt": "Bye"},
        {"prompt": [{"content": "Hi"}, {"content": "Hello!"}, {"content": "So?"}]},
        talk,
        {"prompt": "bye ", "chosen": "A", "rejected": "B"},
        {"messages": [{"role": "system", "content": "Be brief."}, {"content": "Hi"}]},
        {"chosen": f"{hh_opening} You.", "rejected": f"{hh_opening} Me."},
        {"prompt": "Bye"},
    ) == [
        "u:Bye",
        "u:Hi a:Hello! u:Any news?",
        "u:Bye",
        "u:Hi a:Hello! u:So?",
        "u:Hi a:Hello! u:Any news?",
        "u:bye ",
        "s:Be brief. u:Hi",
        "u:Hi a:Yes? u:Who?",
        "u:Bye",
    ]


def test_prompts_keep_references_and_checks(tmp_path: Path) -> None:
    """The rewards and the accuracy of predictions need them."""
    check = {"any_of": ["4"]}
    rows = [
        {"messages": [{"content": "2 + 2?", "check": check}, {"content": "4"}], "quality": 0.5},
        {"prompt": "2 + 2?", "check": check, "chosen": "4", "rejected": "5"},
        tree_row(root(node("a1", "assistant", rank=1), check=check)),
    ]
    question, right = (Message("user", "2 + 2?"),), Check(("4",))
    assert read_prompts(write(tmp_path / "rows.jsonl", *rows)) == [
        Conversation(question, (Message("assistant", "4", 0.5),), right),
        Conversation(question, (Message("assistant", "4", rank=0), Message("assistant", "5", rank=1)), right),
        Conversation((Message("user", "q1"),), (Message("assistant", "a1", rank=1),), right),
    ]


def test_prompts_of_pairs_that_cannot_be_trained_on(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Hi", "chosen": "A", "rejected": "A "},
        {"prompt": "Hi", "chosen": "A", "rejected": ""},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: A", "rejected": "\n\nHuman: Hi\n\nAssistant: A"},
        {"chosen": "\n\nHuman: Hi", "rejected": "\n\nHuman: Hi\n\nAssistant: A"},
    ]
    prompts = read_prompts(write(tmp_path / "rows.jsonl", *rows))
    assert prompts == [Conversation((Message("user", "Hi"),))] * 4


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "A good answer."}, "the row has no prompt"),
        ({"messages": [{"role": "assistant", "content": "Hello!"}]}, "the row has no prompt"),
        (
            {"chosen": "\n\nHuman: A\n\nAssistant: C", "rejected": "\n\nHuman: B\n\nAssistant: C"},
            "the row has no prompt",
        ),
        ({"chosen": "\n\nHuman:\n\nAssistant: C", "rejected": "\n\nHuman:\n\nAssistant: D"}, "the row has no prompt"),
        ({"chosen": "\n\nAssistant: C", "rejected": "\n\nAssistant: D"}, "have no common Human turn"),
        ({"prompt": "Hi", "chosen": "A"}, "chosen and rejected are both required"),
        ({"question": "1 + 1?"}, "no known format"),
        ({"prompt": {"text": "Hi", "role": "prompter"}}, "without message_id"),
        (b"{", "not JSON"),
    ],
)
def test_row_without_a_prompt_is_a_bad_line(
    asked: Any, row: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UserError, match=rf"rows\.jsonl:2: .*{reason}.*; fix the line or set data\.on_bad_line=skip"):
        asked({"prompt": "Hi"}, row)
    assert asked({"prompt": "Hi"}, row, {"prompt": "Bye"}, on_bad_line="skip") == ["u:Hi", "u:Bye"]
    assert "rows.jsonl: skipped 1 bad lines (" in caplog.text
    with pytest.raises(UserError, match=r"rows\.jsonl: contains no prompts \(skipped 1 bad lines .*\); use JSONL rows"):
        asked(row, on_bad_line="skip")


def test_prompts_of_oasst_trees_are_in_the_order_of_the_file(asked: Any) -> None:
    other = node("z1", "prompter", node("z2", "assistant"), lang="de", review_result=False)
    assert asked({"prompt": "Hi"}, tree_row(SMALL), {"prompt": "Hi"}, tree_row(other, tree_state="growing")) == [
        "u:Hi",
        "u:q1",
        "u:q1 a:a1 u:q2",
        "u:q1 a:a1 u:q3",
        "u:q1 a:a2 u:q4",
        "u:Hi",
        "u:z1",
    ]


def test_prompts_of_oasst_messages_are_in_the_order_of_the_user_messages(asked: Any) -> None:
    q1, a1, q2, a3, q3, a2, q4 = flat_rows(SMALL)
    assert asked(q4, a3, {"prompt": "Hi"}, q2, a2, q1, q1, a1, q3) == [
        "u:q1 a:a2 u:q4",
        "u:Hi",
        "u:q1 a:a1 u:q2",
        "u:q1",
        "u:q1 a:a1 u:q3",
    ]


def test_unusable_oasst_messages_have_no_prompt(asked: Any, caplog: pytest.LogCaptureFixture) -> None:
    kept = node("a1", "assistant", node("q2", "prompter", deleted=True), node("q3", "prompter"), synthetic=True)
    lost = node("a2", "assistant", node("q4", "prompter"), deleted=True)
    assert asked(tree_row(root(kept, lost))) == ["u:q1", "u:q1 a:a1 u:q3"]
    assert "rows.jsonl: dropped 2 deleted messages, 1 messages below a dropped one" in caplog.text


def test_prompts_of_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff Who are you? \r\n\r\n\u00a0\n{}\nWho are you?\nGröße?".encode())
    expected = ["u:Who are you?", "u:{}", "u:Who are you?", "u:Größe?"]
    assert [words(prompt) for prompt in read_prompts(path)] == expected
    path.write_bytes(b"Hi\n\xff\nBye")
    with pytest.raises(UserError, match=r"prompts\.txt:2: the line is not UTF-8"):
        read_prompts(path)
    assert [words(prompt) for prompt in read_prompts(path, on_bad_line="skip")] == ["u:Hi", "u:Bye"]


def test_files_without_a_prompt(tmp_path: Path) -> None:
    for name in ("empty.txt", "empty.jsonl"):
        with pytest.raises(UserError, match=f"{name}: contains no prompts; use JSONL rows"):
            read_prompts(write(tmp_path / name, b""))
    with pytest.raises(UserError, match=r"no such data file: .*missing\.txt"):
        read_prompts(tmp_path / "missing.txt")


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
# A damaged copy of valid rows tests the readers better than random bytes.
good_lines = st.sampled_from([json.dumps(row).encode() for row in (GOOD_ROW, tree_row(SMALL), *flat_rows(SMALL))])
damaged_lines = st.tuples(good_lines, st.integers(0, 80), st.binary(max_size=4)).map(
    lambda cut: cut[0][: cut[1]] + cut[2] + cut[0][cut[1] + len(cut[2]) :]
)
lines = st.one_of(st.binary(max_size=60), json_lines, good_lines, damaged_lines)
quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@quick
@given(content=st.binary(max_size=200) | st.lists(lines, max_size=6).map(b"\n".join), zipped=st.booleans())
def test_arbitrary_bytes_only_raise_user_errors(content: bytes, zipped: bool) -> None:
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
        try:
            prompts = read_prompts(path, on_bad_line="skip")
        except UserError as error:
            str(error).encode()
        else:
            assert prompts
            assert all(prompt.is_prompt for prompt in prompts)


@quick
@given(before=st.lists(lines, max_size=5), after=st.lists(lines, max_size=5))
def test_a_valid_row_is_read_between_invalid_ones(before: list[bytes], after: list[bytes]) -> None:
    good = json.dumps({"messages": [{"content": "Is it me?"}, {"content": "It is."}]}).encode()
    content = b"\n".join([*before, good, *after])
    content = b"0\n" + content  # not the first bytes of a compressed file, another encoding or a JSON array
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows")
        path.write_bytes(content)
        trees, _ = read_trees([path], on_bad_line="skip")
    check_invariants(trees)
    assert "u:Is it me? a:It is." in threads_of(trees)


# -- sample files in public layouts --


def test_hh_rlhf_sample() -> None:
    """Seven rows; the last three have an empty response, equal responses and an empty turn in the prompt."""
    trees, report = read_trees([SAMPLES / "hh.jsonl"])
    assert report.dropped == {
        "pairs with an empty reply": 1,
        "identical pairs": 1,
        "pairs with an empty turn in the prompt": 1,
    }
    prompts = [prompt for tree in trees for prompt in tree.prompts]
    assert [len(ranked_pairs(prompt)) for prompt in prompts] == [1, 1, 1, 1]
    assert words(prompts[3]) == "u:Hello a:Hi, what can I do for you? u:Name a tree."
    assert [(reply.text, reply.rank) for reply in prompts[3].references] == [("The oak.", 0), ("A tree.", 1)]
    assert report.lines == 7


def test_sgd_and_koala_samples_together() -> None:
    trees, report = read_trees([SAMPLES / "sgd.jsonl", SAMPLES / "koala.jsonl"])
    assert (report.lines, report.threads) == (5 + 4, 5)
    assert report.dropped == {}
    assert sum(not tree.threads for tree in trees) == 4
    check_invariants(trees)


def test_prompts_of_sample_files() -> None:
    """One prompt per row, except for an hh-rlhf row with an empty turn.

    The OASST sample has 88 user messages, of which one is below a deleted message.
    """
    assert len(read_prompts(SAMPLES / "koala.jsonl")) == 4
    samples = [read_prompts(SAMPLES / f"oasst.{layout}.jsonl.gz") for layout in ("trees", "messages")]
    assert [len(prompts) for prompts in samples] == [87, 87]
    assert len(read_prompts(SAMPLES / "hh.jsonl", on_bad_line="skip")) == 6
    assert len(read_prompts(SAMPLES / "sgd.jsonl")) == 5
