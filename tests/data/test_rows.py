"""Rows of one or two conversations: the result of each kind, and all errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.data_rows import GOOD_ROW, RowReader, check_bad_line, prompts_of, threads_of

from rlchat.conversation import Check, Conversation, Message
from rlchat.data.formats import ranked_pairs


@pytest.fixture
def read(tmp_path: Path) -> RowReader:
    return RowReader(tmp_path)


def test_messages_row_without_roles(read: RowReader) -> None:
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


def test_messages_row_with_roles_check_and_quality_per_message(read: RowReader) -> None:
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


def test_messages_row_with_only_a_user_message_is_a_prompt(read: RowReader) -> None:
    ((tree,), _) = read({"messages": [{"content": "Hi"}]})
    assert (threads_of([tree]), prompts_of([tree])) == ([], ["u:Hi"])


def test_text_row(read: RowReader) -> None:
    ((tree,), report) = read({"text": "A good answer.", "quality": 0.9})
    response = Message("assistant", "A good answer.", 0.9)
    assert tree.prompts == (Conversation((), references=(response,), tree_id=tree.id),)
    assert tree.threads == (Conversation((response,), tree_id=tree.id),)
    assert (report.prompts, report.responses) == (0, 1)


@pytest.mark.parametrize("prompt", ["Hi", [{"role": "user", "content": "Hi"}], [{"content": "Hi"}]])
def test_preference_pair(read: RowReader, prompt: Any) -> None:
    ((tree,), _) = read({"prompt": prompt, "chosen": "Hello!", "rejected": "What."})
    better, worse = Message("assistant", "Hello!", rank=0), Message("assistant", "What.", rank=1)
    assert tree.prompts == (Conversation((Message("user", "Hi"),), (better, worse), tree_id=tree.id),)
    assert threads_of([tree]) == ["u:Hi a:Hello!"]
    assert ranked_pairs(tree.prompts[0]) == [(better, worse)]


def test_prompt_row(read: RowReader) -> None:
    ((tree,), _) = read({"id": "koala_0", "prompt": "Name a colour.", "check": {"any_of": ["red"]}})
    assert tree.threads == ()
    assert tree.prompts == (Conversation((Message("user", "Name a colour."),), (), Check(("red",)), tree.id),)
    ((tree,), _) = read({"prompt": [{"content": "Hi"}, {"content": "Hello!"}, {"content": "Name a colour."}]})
    assert prompts_of([tree]) == ["u:Hi a:Hello! u:Name a colour."]


@pytest.mark.parametrize(
    ("row", "check"),
    [
        ({"answer": "Paris"}, Check(("Paris",))),
        ({"answer": ["Paris", "Paname"]}, Check(("Paris", "Paname"))),
        ({"answer": 42}, Check(("42",), kind="number")),
        ({"answer": [1.5, "1,000"]}, Check(("1.5", "1,000"), kind="number")),
        ({"answer": "42", "check": "exact"}, Check(("42",), kind="exact")),
        ({"answer": "42 or more"}, Check(("42 or more",))),
        ({"answer": "^a+$", "check": "regex"}, Check(("^a+$",), kind="regex")),
        ({"check": {"exact": "Paris"}}, Check(("Paris",), kind="exact")),
        ({"check": {"number": 3, "tolerance": 0.5}}, Check(("3",), kind="number", tolerance=0.5)),
        ({"check": {"regex": ["a", "b"], "none_of": ["c"]}}, Check(("a", "b"), ("c",), "regex")),
        ({"check": {"contains": "Paris", "none_of": ["Rome"]}}, Check(("Paris",), ("Rome",))),
        ({}, None),
    ],
)
def test_answers(read: RowReader, row: dict[str, Any], check: Check | None) -> None:
    """With a prompt the row is one to answer; with a response, or as messages, it is also a conversation."""
    ((tree,), report) = read({"prompt": "What?", **row})
    assert (tree.threads, [(prompt.check, prompt.references) for prompt in tree.prompts]) == ((), [(check, ())])
    for rest in ({"prompt": "What?", "completion": "This."}, {"instruction": "What?", "output": "This."}):
        ((tree,), report) = read({**rest, **row})
        assert threads_of([tree]) == ["u:What? a:This."]
        assert [prompt.check for prompt in tree.prompts] == [check]
    messages = [{"content": "Hi"}, {"content": "Hello"}, {"content": "What?"}, {"content": "This."}]
    ((tree,), report) = read({"messages": messages, **row})
    assert [prompt.check for prompt in tree.prompts] == [None, check]
    messages[0].update(row)
    ((tree,), report) = read({"messages": messages})
    assert [prompt.check for prompt in tree.prompts] == [check, None]
    ((tree,), report) = read({"prompt": "What?", "chosen": "This.", "rejected": "That.", **row})
    assert [prompt.check for prompt in tree.prompts] == [check]
    assert (report.unread, report.warnings) == ({}, {})


def test_hh_pair(read: RowReader) -> None:
    opening = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Any news?\n\nAssistant:"
    ((tree,), _) = read({"chosen": f"{opening} None.\n\nGood night.", "rejected": f"{opening} Go away."})
    assert prompts_of([tree]) == ["u:Hi a:Hello! u:Any news?"]
    assert threads_of([tree]) == ["u:Hi a:Hello! u:Any news? a:None.\n\nGood night."]
    assert [(better.text, worse.text) for better, worse in ranked_pairs(tree.prompts[0])] == [
        ("None.\n\nGood night.", "Go away.")
    ]


def test_consecutive_hh_turns_of_one_speaker_are_joined(read: RowReader) -> None:
    chosen = "\n\nHuman: Hi\n\nAssistant: Just a second.\n\nAssistant: Hello!"
    ((tree,), _) = read({"chosen": chosen, "rejected": "\n\nHuman: Hi\n\nAssistant: No."})
    assert [reply.text for reply in tree.prompts[0].references] == ["Just a second.\n\nHello!", "No."]


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("\n\nHuman: Hi\n\nAssistant: Yes", "\n\nHuman: Hi\n\nAssistant: Yes ", "identical pairs"),
        ("\n\nHuman: Hi\n\nAssistant:", "\n\nHuman: Hi\n\nAssistant: No", "pairs with an empty reply"),
        ("\n\nHuman: Hi", "\n\nHuman: Hi\n\nAssistant: No", "pairs that end with Human"),
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
def test_unusable_hh_pairs_are_counted(read: RowReader, chosen: str, rejected: str, reason: str) -> None:
    _, report = read({"chosen": chosen, "rejected": rejected}, GOOD_ROW)
    assert report.dropped == {reason: 1}
    assert report.bad_lines == 0


def test_unusable_preference_pairs_are_counted(read: RowReader) -> None:
    rows = [{"prompt": "Hi", "chosen": "A", "rejected": "A"}, {"prompt": "Hi", "chosen": "A", "rejected": " "}]
    _, report = read(*rows, GOOD_ROW)
    assert report.dropped == {"identical pairs": 1, "pairs with an empty reply": 1}


# -- invalid rows --

LONE_SURROGATE = b'{"text": "\\ud800"}'


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "a\0b"}, "NUL"),
        (LONE_SURROGATE, "lone surrogate"),
        ({"text": " "}, "text is empty"),
        ({"text": 3}, "text is not a string"),
        ({"text": "a", "quality": "good"}, "quality is not a number"),
        ({"text": "a", "quality": True}, "quality is not a number"),
        (b'{"text": "a", "quality": NaN}', "is not between 0 and 1"),
        ({"text": "a", "quality": 7}, "is not between 0 and 1"),
        ({"messages": []}, "messages is not a non-empty list of messages"),
        ({"messages": "Hi"}, "messages is not a non-empty list of messages"),
        ({"messages": ["Hi"]}, "a message is not an object"),
        ({"messages": [{"text": "Hi"}]}, "content is not a string"),
        ({"messages": [{"content": ""}]}, "content is empty"),
        ({"messages": [{"content": "Hi", "role": "narrator"}]}, "unknown role 'narrator'"),
        ({"messages": [{"content": "Hi", "role": "system"}]}, "no user or assistant message"),
        ({"messages": [{"content": "Hi", "check": {"any_of": "Paris"}}]}, "any_of is not of type list"),
        ({"messages": [{"content": "Hi", "check": {"any_of": []}}]}, "any_of is missing or empty"),
        ({"messages": [{"content": "Hi", "check": ["Paris"]}]}, "check is not an object"),
        ({"prompt": "Hi", "answer": True}, "answer is not a string: got True"),
        ({"prompt": "Hi", "answer": []}, "answer is an empty list"),
        ({"prompt": "Hi", "answer": " "}, "answer is empty"),
        ({"prompt": "Hi", "answer": "?!"}, "answer holds no word to search for"),
        (b'{"prompt": "Hi", "answer": Infinity}', "answer is not a finite number"),
        ({"prompt": "Hi", "answer": "a", "check": "equal"}, "unknown check 'equal'; expected one of contains, exact,"),
        ({"prompt": "Hi", "answer": "a", "check": "number"}, "answer is not a number: got 'a'"),
        ({"prompt": "Hi", "answer": "(", "check": "regex"}, "answer is not a regular expression"),
        ({"prompt": "Hi", "answer": r"\p{L}", "check": "regex"}, "answer is not a regular expression"),
        ({"prompt": "Hi", "answer": "[[:alpha:]]", "check": "regex"}, "answer is not a regular expression"),
        ({"prompt": "Hi", "answer": "a", "check": {"exact": "b"}}, "answer beside a check object"),
        ({"prompt": "Hi", "check": "exact"}, "check 'exact' needs an answer beside it"),
        ({"prompt": "Hi", "check": {"exact": "a", "regex": "b"}}, "check has both exact and regex"),
        ({"prompt": "Hi", "check": {"number": 1, "tolerence": 2}}, "check has the unknown key 'tolerence'"),
        ({"prompt": "Hi", "check": {"number": 1, "tolerance": -1}}, "check.tolerance is not a number of at least 0"),
        ({"messages": [{"content": "Hi", "role": "assistant"}], "answer": "a"}, "without a user message"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": 3}, "prompt is not a string"),
        ({"prompt": []}, "messages is not a non-empty list of messages"),
        ({"prompt": [{"content": "Hi"}, {"content": "Hello!"}]}, "prompt does not end with a user message"),
        ({"prompt": "Hi", "chosen": ["A"], "rejected": "B"}, "rejected is not a list of messages, but chosen is"),
        ({"chosen": "Hi", "rejected": "Ho"}, "chosen does not begin with Human"),
        ({"chosen": "\n\nAssistant: Hi", "rejected": "\n\nAssistant: Ho"}, "have no common Human turn"),
    ],
)
def test_a_bad_line_stops_the_run_or_is_counted(read: RowReader, row: Any, reason: str) -> None:
    check_bad_line(read, row, reason)
