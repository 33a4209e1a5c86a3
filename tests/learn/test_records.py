"""What a round of learning says about its verdicts."""

from __future__ import annotations

from typing import Any

import pytest

from rlchat.learn.records import describe

NONE: dict[str, Any] = {"held_back": 0, "replaced": 0, "withdrawn": 0, "bad_lines": 0, "left_out": {}}


@pytest.mark.parametrize(
    ("counts", "line"),
    [
        ({"verdicts": 1, "kinds": {"corrected": 1}}, "1 verdict: 1 corrected"),
        (
            {"verdicts": 3, "kinds": {"bad": 1, "good": 2}, "bad_lines": 1},
            "3 verdicts: 2 good, 1 bad (left out: 1 damaged line)",
        ),
        (
            {
                "verdicts": 1200,
                "kinds": {"good": 1200},
                "held_back": 240,
                "bad_lines": 2,
                "withdrawn": 1,
                "left_out": {"on responses of other models": 3},
            },
            "1,200 verdicts: 1200 good; 240 of them held back for the gate (left out: 1 taken back, 2 damaged lines, "
            "3 on responses of other models)",
        ),
    ],
)
def test_the_verdicts_of_a_round(counts: dict[str, Any], line: str) -> None:
    assert describe({**NONE, **counts}) == line
