"""`benchmarks.learn_while_chatting.real`: the user's verdicts and corrections, stored runs, the table, the figure."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from helpers.chat_models import random_policy

from benchmarks.learn_while_chatting.real import pieces
from benchmarks.learn_while_chatting.real.pieces import (
    _REPLAYED,
    Piece,
    all_pieces,
    figures_of,
    give_feedback,
    run,
)
from benchmarks.learn_while_chatting.real.report import Results, draw, table
from benchmarks.learn_while_chatting.real.user import PREFERENCES, THANKS, Preference, accepts, corrected, verdict
from rlchat.chat.feedback import Correction
from rlchat.chat.verdicts import read_verdicts
from rlchat.conversation import Check, Conversation, Message
from rlchat.demo.real.measure import Sampled, read_data
from rlchat.models.model_file import identity, save_bundle
from rlchat.rewards import Reply
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

LONG = (
    "In the context of laws and customs, the legal obligation to return lost property under the provisions of the law "
    "is that it should be prioritized according to its weight, and the amount"
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Bees see colours. They also smell flowers.", "Bees see colours."),
        ("Yes!\nBees see colours, and they smell.", "Bees see colours, and they smell."),
        ("Here are some tips:\n\n1. **Rest**: sleep for eight hours.\n2. Eat.", "Rest: sleep for eight hours."),
        ("Bees see many col", "Bees see many col."),
        (LONG, "In the context of laws and customs."),
        (" ".join(["word"] * 40), " ".join(["word"] * 25) + "."),
        ("", "I am not sure about that."),
        ("```", "I am not sure about that."),
    ],
)
def test_a_correction_is_the_first_sentence_that_says_something(text: str, expected: str) -> None:
    assert corrected("short", text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Bees see colours. They smell.\nMore about bees.", f"Bees see colours. They smell. {THANKS}"),
        ("Bees see colours. They smell and", f"Bees see colours. {THANKS}"),
        ("1. Rest", f"I am not sure about that. {THANKS}"),
    ],
)
def test_a_correction_says_thanks(text: str, expected: str) -> None:
    assert corrected("thanks", text) == expected


@pytest.mark.parametrize("preference", PREFERENCES)
@pytest.mark.parametrize("text", ["Bees see. They smell.", "Tips:\n- Rest.\n- Eat", LONG, "", "a", "Ünï cödé 蜜蜂。"])
def test_the_user_accepts_its_own_corrections(preference: Preference, text: str) -> None:
    found = verdict(preference, Reply(text, 9, True))
    assert isinstance(found, Correction)
    again = Reply(found.text, 9, True)
    assert verdict(preference, again) == "good"
    assert not accepts(preference, Reply(found.text, 9, False))  # cut off at the limit of tokens


def test_feedback_is_that_of_a_chat(workplace: Path, tokenizer: ChatTokenizer) -> None:
    model = random_policy(tokenizer)
    model.max_length = 256
    counts = give_feedback(Piece(6, "thanks", 3), model, "chat.pt", Path("six.jsonl"))
    verdicts, _ = read_verdicts("six.jsonl")
    assert len(verdicts) == 6
    assert Counter(v.kind for v in verdicts) == counts
    assert {v.model_id for v in verdicts} == {identity(model)}
    assert all(v.correction.endswith(THANKS) for v in verdicts if v.kind == "corrected")
    give_feedback(Piece(3, "thanks", 3), model, "chat.pt", Path("three.jsonl"))
    assert {v.prompt for v in read_verdicts("three.jsonl")[0]} < {v.prompt for v in verdicts}


def test_training_and_the_gate_see_nothing_that_is_reported() -> None:
    def openings(*names: str) -> set[str]:
        return {prompt.messages[0].text for name in names for prompt in read_data(name)}

    assert not openings("train.jsonl", *_REPLAYED) & openings("held_out.jsonl", "control.jsonl")


def sample(text: str, check: Check | None = None) -> Sampled:
    return Sampled(Conversation((Message("user", "?"),), check=check), [1], [2], Reply(text, 3, True))


def test_the_figures_of_replies() -> None:
    greedy = [sample("Bees see colours."), sample(f"Yes. {THANKS}"), sample("a"), sample("One. Two three four.")]
    control = [sample("It is Rome.", Check(("Rome",))), sample("It is Oslo.", Check(("Rome",)))]
    found = figures_of(greedy, control)
    assert found["taught"] == {"short": 0.25, "thanks": 0.25}
    assert (found["correct"], found["controls"]) == (1, 2)
    assert found["words"] == (3 + 4 + 1 + 4) / 4


def test_a_run_is_stored_and_not_repeated(
    workplace: Path, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_bundle("chat.pt", random_policy(tokenizer))
    monkeypatch.setattr(pieces, "_figures", lambda policy, base, seed: {"perplexity": 7.0})
    first = run(Piece(0), Path("chat.pt"), Path("out"))
    assert first["figures"] == {"perplexity": 7.0}
    monkeypatch.setattr(pieces, "_figures", lambda policy, base, seed: {})
    assert run(Piece(0), Path("chat.pt"), Path("out")) == first
    (path,) = Path("out").iterdir()
    path.write_text(json.dumps({**first, "model": "another"}))
    with pytest.raises(SystemExit, match="is of another model"):
        run(Piece(0), Path("chat.pt"), Path("out"))


def figures(short: float, **more: Any) -> dict[str, Any]:
    common = {"correct": 28, "controls": 40, "perplexity": 8.0, "kl": 2.0, "words": 20.0}
    return {"taught": {"short": short, "thanks": 0.0}, **common, **more}


def result(verdicts: int, seed: int, short: float, *, accepted: bool = True, **more: Any) -> dict[str, Any]:
    held_back = {"agrees": 4, "verdicts": 5} if verdicts > 9 else {"agrees": None, "verdicts": 0}
    gate = {"before": {**held_back, "agrees": held_back["agrees"] and 1}, "after": held_back}
    common = {"verdicts": verdicts, "preference": "short", "seed": seed, "cpu_seconds": 90.0, "round_cpu_seconds": 60.0}
    return {
        **common,
        "figures": figures(short, **more),
        "accepted": accepted,
        "accepted_by_default": not seed,
        "gate": gate,
    }


RUNS = [
    {"verdicts": 0, "figures": figures(0.1, words=40.0, kl=0.0), "cpu_seconds": 9.0},
    *(result(8, seed, 0.6 + 0.1 * seed, perplexity=8.4) for seed in range(3)),
    *(result(25, seed, 0.9, accepted=seed == 1, correct=26) for seed in range(3)),
]


def test_the_table_has_changes_without_and_with_the_gate() -> None:
    rows = table(RUNS).splitlines()
    assert rows[2:] == [
        "| short | 8 | 10 % | +60.0 ± 24.8 | 3 of 3 | 1 of 3 | +60.0 ± 24.8 | 28.0 → 28.0 | +5.0 ± 0.0 % "
        "| 2.0 | 40.0 → 20.0 | – | 60 |",
        "| short | 25 | 10 % | +80.0 ± 0.0 | 1 of 3 | 1 of 3 | +26.7 ± 114.7 | 28.0 → 26.0 | +0.0 ± 0.0 % "
        "| 2.0 | 40.0 → 20.0 | 20% → 80% | 60 |",
    ]


def test_the_figure_shows_every_run() -> None:
    (axes,) = draw(RUNS).axes
    without, with_gate = (line for line in axes.lines if not line.get_label().startswith("_"))
    assert list(without.get_ydata()) == pytest.approx([10, 70, 90])
    assert list(with_gate.get_ydata()) == pytest.approx([10, 70, 90 - 2 * 80 / 3])
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert sum(len(line.get_ydata()) for line in dots) == 2 * 7
    assert Results(RUNS).preferences() == ["short"]
    assert not draw(RUNS[:1]).axes[0].lines  # only the start has been run


def test_the_pieces_have_different_names() -> None:
    runs = all_pieces(preferences=PREFERENCES)
    assert len({piece.name for piece in runs}) == len(runs)
    assert runs[0].verdicts == 0
