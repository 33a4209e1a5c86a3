"""Which verdicts are held back, and why sometimes none is."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlchat.chat.verdicts import JudgedResponse, VerdictKind
from rlchat.conversation import Conversation, Message
from rlchat.learn.held_back import in_held_back_fifth, split, trained_prompts


def verdict(question: str, kind: VerdictKind = "good") -> JudgedResponse:
    prompt = Conversation((Message("user", question),))
    return JudgedResponse(prompt, "Hi.", kind, "", "m.pt", f"{question}/{kind}")


MANY = [verdict(f"Question {n}") for n in range(500)]
FIFTH = [v for v in MANY if in_held_back_fifth(v)]
OTHERS = [v for v in MANY if not in_held_back_fifth(v)]


def test_a_prompt_is_never_on_both_sides() -> None:
    sides = split([*MANY, *(verdict(f"Question {n}", "bad") for n in range(500))])
    assert 0.15 < len(sides.held_back) / 1000 < 0.25
    assert len(sides.training) + len(sides.held_back) == 1000
    assert {v.opening_id for v in sides.held_back} & set(sides.trained_prompts) == set()
    assert {v.opening_id for v in sides.training} == set(sides.trained_prompts)
    assert in_held_back_fifth(verdict("  question   7 ")) == in_held_back_fifth(verdict("Question 7"))


def test_what_trained_the_version_in_use_is_not_held_back_later() -> None:
    """A version of eight verdicts is compared with one of twenty on verdicts that trained neither."""
    first = [*FIFTH[:4], *OTHERS[:4]]
    made = split(first)
    assert made.training == first
    later = split([*first, *FIFTH[4:8], *OTHERS[4:12]], made.trained_prompts)
    assert later.held_back == FIFTH[4:8]
    assert later.training == [*first, *OTHERS[4:12]]
    assert split([*first, *FIFTH[4:8], *OTHERS[4:12]]).held_back == FIFTH[:8]  # none of them trained the original


@pytest.mark.parametrize(
    ("verdicts", "trained", "why"),
    [
        (FIFTH[:9], [], "9 verdicts are fewer than 10"),
        (FIFTH[:1], [], "1 verdict is fewer than 10"),
        (OTHERS[:12], [], "all verdicts are on prompts of the four fifths that train"),
        (FIFTH[:12], [], "all verdicts are on prompts of the fifth to hold back, and something must train"),
        ([*FIFTH[:2], *OTHERS[:10]], FIFTH[:2], "all verdicts of the fifth to hold back trained the version in use"),
    ],
)
def test_why_none_is_held_back(verdicts: list[JudgedResponse], trained: list[JudgedResponse], why: str) -> None:
    sides = split(verdicts, {v.opening_id for v in trained})
    assert (sides.training, sides.held_back, sides.why_none) == (verdicts, [], why)


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"trained_prompts": 3}'])
def test_a_version_without_a_record(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "1.json").write_text(text)
    assert trained_prompts(tmp_path / "1.pt") is None
