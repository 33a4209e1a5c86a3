"""`benchmarks/learn_while_chatting`: the simulated user's truth and verdicts, stored runs, the table and the figure."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.chat_models import random_policy

from benchmarks.learn_while_chatting.pieces import Piece, all_pieces, give_feedback, gold, run
from benchmarks.learn_while_chatting.report import Results, chained_table, draw, table, with_interval
from benchmarks.learn_while_chatting.user import MOST_WORDS, PREFERENCES, TAUGHT, Preference, User
from rlchat.chat import ChatInterface
from rlchat.chat.feedback import Correction
from rlchat.chat.verdicts import read_verdicts
from rlchat.demo.world import make_world
from rlchat.models.model_file import identity, save_bundle
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer


@pytest.mark.parametrize("preference", PREFERENCES)
def test_the_user_accepts_its_own_answers_and_no_mistakes(preference: Preference) -> None:
    user, rng = User(preference, 3), random.Random(0)
    for one in [*user.asks(400, rng), *user.held_out_others, *user.held_out_taught]:
        assert user.accepts(one, user.answer(one, rng))
        assert not user.accepts(one, user.answer(one, rng, wrong=True))


def test_the_hidden_preferences() -> None:
    world = make_world(random.Random(0))
    facts, polite, short = (User(preference, 0) for preference in PREFERENCES)
    for one in facts.held_out_taught:
        assert not facts.accepts(one, f"{world['capital'][one.subject].right}.")  # every capital has moved
    rng = random.Random(0)
    assert all(polite.answer(one, rng).endswith("Thanks for asking.") for one in polite.held_out_taught)
    assert not polite.accepts(polite.held_out_taught[0], polite.held_out_taught[0].claim.right)
    for one in short.held_out_taught:
        assert len(short.answer(one, rng).split()) <= MOST_WORDS
        assert not short.accepts(one, f"I think that it is {one.claim.right}.")
    assert len({one.text for one in facts.held_out_others} - {one.text for one in polite.held_out_others}) > 0


def test_held_out_questions_are_never_asked_and_mix_the_kinds() -> None:
    for preference in PREFERENCES:
        user = User(preference, 0)
        held_out = {one.text for one in (*user.held_out_taught, *user.held_out_others)}
        assert len(held_out) == 800
        few, many = ({one.text for one in user.asks(n, random.Random(n))} for n in (8, 500))
        assert few < many
        assert not many & held_out
        kinds = Counter(one.kind.name for one in user.held_out_others)
        assert not TAUGHT[preference] & set(kinds)
        assert max(kinds.values()) <= 1.5 * 600 / len(kinds)
        assert {one.kind.name for one in user.held_out_taught} == TAUGHT[preference]


def test_verdicts_are_right_or_wrong() -> None:
    user, rng = User("facts", 0), random.Random(0)
    one = user.held_out_taught[0]
    right, bad = user.answer(one, rng), user.answer(one, rng, wrong=True)
    for form in ("edits", "thumbs"):
        assert user.verdict(one, right, form, rng, wrong=False) == "good"
        assert user.verdict(one, bad, form, rng, wrong=True) == "good"
    assert user.verdict(one, bad, "thumbs", rng, wrong=False) == "bad"
    assert user.verdict(one, right, "thumbs", rng, wrong=True) == "bad"
    correction = user.verdict(one, bad, "edits", rng, wrong=False)
    assert isinstance(correction, Correction)
    assert user.accepts(one, correction.text)
    correction = user.verdict(one, right, "edits", rng, wrong=True)
    assert isinstance(correction, Correction)
    assert not user.accepts(one, correction.text)


@pytest.fixture
def chat(workplace: Path, tokenizer: ChatTokenizer) -> ChatInterface:
    save_bundle("chat.pt", random_policy(tokenizer))
    return ChatInterface("chat.pt", device="cpu", seed=0)


def test_feedback_is_that_of_a_chat(chat: ChatInterface) -> None:
    user = User("facts", 0)
    rng = random.Random(0)
    counts = give_feedback(Piece(20, wrong=0.4), user, chat, Path("feedback.jsonl"), user.asks(20, rng), rng)
    verdicts, _ = read_verdicts("feedback.jsonl")
    assert len(verdicts) == 20
    assert {verdict.model_id for verdict in verdicts} == {identity(chat.bundle)}
    assert Counter(v.kind for v in verdicts) == {kind: n for kind, n in counts.items() if kind != "wrong"}
    assert 0 < counts["wrong"] < 20


def test_a_run_is_stored_and_not_repeated(chat: ChatInterface, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {"taught": 0.5, "taught_sampled": 0.4, "others": 0.9, "others_sampled": 0.8}
    monkeypatch.setattr("benchmarks.learn_while_chatting.pieces.gold", lambda user, chat: measured)
    first = run(Piece(0), Path("chat.pt"), "data.jsonl", Path("out"))
    assert first["gold"] == measured
    monkeypatch.setattr("benchmarks.learn_while_chatting.pieces.gold", lambda user, chat: {})
    assert run(Piece(0), Path("chat.pt"), "data.jsonl", Path("out")) == first
    (path,) = Path("out").iterdir()
    path.write_text(json.dumps({**first, "model": "another"}))
    with pytest.raises(SystemExit, match="is of another model"):
        run(Piece(0), Path("chat.pt"), "data.jsonl", Path("out"))


@pytest.mark.slow
def test_a_whole_run(chat: ChatInterface) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": f"It is {n}."}]}
        for n in range(30)
    ]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = run(Piece(20), Path("chat.pt"), "data.jsonl", Path("out"))
    assert found["gold"].keys() == gold(User("facts", 0), chat).keys()
    assert found["counts"]["corrected"] == 20  # a random model has no right response
    assert found["after"]["verdicts"] > 0


@pytest.mark.slow
def test_a_chained_run_asks_the_version_in_use(chat: ChatInterface) -> None:
    replies = ["It is one.", "It is two."]
    rows = [
        {"messages": [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": replies[n % 2]}]}
        for n in range(30)
    ]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = run(Piece(12, every=6), Path("chat.pt"), "data.jsonl", Path("out"))
    assert [one["verdicts"] for one in found["rounds"]] == [6, 12]
    assert found["gold"] == found["rounds"][-1]["gold"]
    assert sum(found["counts"].values()) == 12


def result(
    verdicts: int, seed: int, taught: float, others: float, accepted: bool = True, **more: Any
) -> dict[str, Any]:
    figures = {"agrees": 8, "verdicts": 10}
    common = {"preference": "facts", "method": "dpo", "form": "edits", "wrong": 0.0, "verdicts": verdicts, "seed": seed}
    common["every"] = 0
    gold = {"taught": taught, "others": others}
    return {**common, "gold": gold, "accepted": accepted, "before": {**figures, "agrees": 4}, "after": figures, **more}


RUNS = [
    *(result(0, seed, 0.1, 0.9) for seed in range(3)),
    *(result(200, seed, 0.7 + 0.1 * seed, 0.89) for seed in range(3)),
    *(result(200, seed, 0.2, 0.5, accepted=seed == 0, wrong=0.5) for seed in range(3)),
    result(200, 7, 1.0, 1.0),  # without a start
]


def test_the_table_has_changes_without_and_with_the_gate() -> None:
    rows = table(RUNS).splitlines()
    assert len(rows) == 4
    assert rows[2] == (
        "| facts | DPO | edits | 0% | 200 | 10 % | +70.0 ± 24.8 | -1.0 ± 0.0 | 3 of 3 | +70.0 ± 24.8 | -1.0 ± 0.0 "
        "| 40% → 80% |"
    )
    assert "+10.0 ± 0.0 | -40.0 ± 0.0 | 1 of 3 | +3.3 ± 14.3 | -13.3 ± 57.4" in rows[3]
    assert Results(RUNS).level(RUNS[7], "others", gate=True) == 90
    assert with_interval([1.5]) == "+1.5"


def test_the_second_table_follows_the_version_in_use() -> None:
    def chained(seed: int, taught: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
        golds = [{"taught": one, "others": other} for one, other in zip(taught, others, strict=True)]
        rounds = [{"verdicts": 50 * (i + 1), "gold": gold, "accepted": i != 1} for i, gold in enumerate(golds)]
        return result(200, seed, taught[-1], others[-1], every=50, rounds=rounds)

    runs = [*RUNS, chained(0, (0.2, 0.2, 0.4, 0.7), (0.9, 0.9, 0.87, 0.9)), chained(1, (0.3, 0.3, 0.6, 0.9), [0.9] * 4)]
    assert table(runs) == table(RUNS)  # such a run is in its own table
    _, _, row = chained_table(runs).splitlines()
    assert row.startswith("| facts | DPO | edits | 0% | 200 | 6 of 8 | +15.0 ± 63.5 | +15.0 ± 63.5 | +40.0")
    assert row.endswith("| -3.0 | +0.0 ± 0.0 |")


def test_the_figure_shows_every_line() -> None:
    figure = draw(RUNS)
    left, middle, right = figure.axes
    assert [list(line.get_ydata()) for line in left.lines[:1]] == [[10, pytest.approx(80)]]
    assert "with the gate" in [text.get_text() for text in middle.get_legend().get_texts()]
    assert right.get_title(loc="left") == "New style, DPO"


def test_the_pieces_have_different_names() -> None:
    pieces = all_pieces()
    assert len({piece.name for piece in pieces}) == len(pieces)
    assert {piece.preference for piece in pieces} == set(PREFERENCES)
