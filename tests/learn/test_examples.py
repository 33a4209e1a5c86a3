"""From verdicts to training data: pairs, labels and corrections, votes of several clients, and the held-back fifth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from rlchat.chat.verdicts import JudgedResponse, VerdictKind
from rlchat.conversation import Check, CheckKind, Conversation, Message
from rlchat.data.datamodule import DataNeeds, OASST2DataModule
from rlchat.data.formats import read_trees
from rlchat.learn.examples import fits, held, judged_prompts, rejected_texts, words_of, write_prompts
from rlchat.learn.learner import uncorrected
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer


def verdict(response: str, kind: VerdictKind, correction: str = "", question: str = "Hello") -> JudgedResponse:
    prompt = Conversation((Message("user", question),))
    return JudgedResponse(prompt, response, kind, correction, "m.pt", f"{question}/{response}/{kind}")


def judged(*verdicts: JudgedResponse) -> list[tuple[str, int | None, float | None]]:
    return [(r.text, r.rank, r.quality) for prompt in judged_prompts(verdicts) for r in prompt.references]


GOOD, BAD, CORRECTED = verdict("Hi.", "good"), verdict("Go.", "bad"), verdict("Go.", "corrected", "Hello!")


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ([GOOD], [("Hi.", None, 1.0)]),
        ([BAD], [("Go.", None, 0.0)]),
        ([CORRECTED], [("Hello!", 0, None), ("Go.", 1, None)]),
        ([GOOD, BAD], [("Hi.", 0, None), ("Go.", 1, None)]),
        ([CORRECTED, GOOD], [("Hello!", 0, None), ("Go.", 1, None), ("Hi.", 0, None)]),
        ([verdict("", "corrected", "Hello!")], [("Hello!", 0, None)]),
        ([verdict("", "corrected", "Hello!"), GOOD], [("Hello!", 0, None), ("Hi.", None, 1.0)]),
        ([GOOD, verdict("Hi.", "bad")], []),  # one vote each
        ([GOOD, GOOD, verdict("Hi.", "bad")], [("Hi.", None, 1.0)]),  # two against one
        ([CORRECTED, verdict("Hello!", "bad"), verdict("Hello!", "bad")], [("Hello!", None, 0.0), ("Go.", None, 0.0)]),
    ],
)
def test_pairs_where_there_are_two_responses_and_labels_otherwise(
    verdicts: list[JudgedResponse], expected: list[tuple[str, int | None, float | None]]
) -> None:
    assert judged(*verdicts) == expected


def test_prompts_stay_apart() -> None:
    assert judged(GOOD, verdict("Go.", "bad", question="Bye")) == [("Hi.", None, 1.0), ("Go.", None, 0.0)]


def test_rejected_texts() -> None:
    assert rejected_texts(judged_prompts([CORRECTED, verdict("No.", "bad", question="Bye"), GOOD])) == {"go", "no"}
    assert words_of("Tova is the capital, yes.") == words_of("Yes: the capital is Tova") != words_of("The capital")


def test_the_rows_are_read_as_they_were_meant(tmp_path: Path) -> None:
    later = Conversation(
        (Message("system", "Be kind."), Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    )
    prompts = [*judged_prompts([GOOD, verdict("Go.", "corrected", "Yes.", "Bye")]), held(later, "d")]
    write_prompts(tmp_path / "rows.jsonl", prompts)
    trees, _ = read_trees([tmp_path / "rows.jsonl"], lang=None)
    found = [
        p
        for tree in trees
        for p in tree.prompts
        if any(r.rank is not None or r.quality is not None for r in p.references)
    ]
    texts = [[[(m.role, m.text) for m in p.messages] for p in rows] for rows in (found, prompts)]
    assert texts[0] == texts[1]
    assert [p.references for p in found] == [p.references for p in prompts]
    context = found[-1].messages[2]
    assert (context.text, context.learn) == ("b", False)


@pytest.mark.parametrize("kind", get_args(CheckKind))
def test_the_answer_of_a_prompt_is_kept(kind: CheckKind, tmp_path: Path) -> None:
    check = Check(("5", "7"), ("6",), kind, 0.5 if kind == "number" else 0.0)
    messages = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    prompts = [replace(GOOD.prompt, check=check), Conversation(messages, (Message("assistant", "5"),), check)]
    write_prompts(tmp_path / "rows.jsonl", prompts)
    trees, _ = read_trees([tmp_path / "rows.jsonl"], lang=None)
    found = {p.messages[-1].text: p.check for tree in trees for p in tree.prompts}
    assert found == {"Hello": check, "a": None, "c": check}


def test_dpo_gets_pairs_labels_and_lone_responses(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    prompts = [*judged_prompts([GOOD, verdict("Go.", "corrected", "Yes.", "Bye")]), held(GOOD.prompt, "d")]
    write_prompts(tmp_path / "rows.jsonl", prompts)
    data = OASST2DataModule(str(tmp_path / "rows.jsonl"), lang=None, val_fraction=0, test_fraction=0)
    data.needs = DataNeeds("dpo", tokenizer, 32, unpaired=True)
    data.setup()
    (batch,) = data.train_dataloader()
    rows = {(rank, str(quality)) for rank, quality in zip(batch.rank.tolist(), batch.quality.tolist(), strict=True)}
    assert rows == {(-1, "1.0"), (-1, "0.5"), (0, "nan"), (1, "nan")}
    assert sorted(batch.group.bincount().tolist()) == [1, 1, 2]
    data.needs = DataNeeds("dpo", tokenizer, 32)
    data.setup()
    (batch,) = data.train_dataloader()
    assert batch.rank.tolist() == [0, 1]


def test_what_fits(tokenizer: ChatTokenizer) -> None:
    assert fits(GOOD, tokenizer, 32)
    assert not fits(verdict("x " * 40, "bad"), tokenizer, 32)
    assert not fits(verdict("Hi.", "corrected", "x " * 40), tokenizer, 32)
    assert not fits(verdict("Hi.", "bad", question="x " * 40), tokenizer, 32)
    older = Conversation((Message("user", "x " * 40), Message("assistant", "y"), Message("user", "Hello")))
    assert fits(JudgedResponse(older, "Hi.", "good", "", "", ""), tokenizer, 32)  # older messages may go


def test_controls_that_a_correction_contradicts_are_left_out_up_to_five_percent() -> None:
    controls = [Conversation((Message("user", f"Question {n}"),)) for n in range(40)]
    replies = ["Go! go", "Stay.", "Yes", *["No."] * 37]
    judged = [verdict("go, Go.", "corrected", "Hello!"), verdict("Stay.", "bad"), verdict("Yes", "corrected", "Ja")]
    assert uncorrected(controls, replies, judged) == [controls[1], *controls[3:]]  # two of forty
    many = ["yes", *replies[1:-2], "go go", "yes"]  # four, of which "Go, go" is corrected most
    assert uncorrected(controls, many, [*judged, judged[0]]) == [*controls[1:38], controls[39]]
    assert uncorrected([], [], judged) == []
    liked = [*judged, verdict("Go go.", "good", question="Bye")]  # one correction of these words, one 👍
    assert uncorrected(controls, replies, liked) == [*controls[:2], *controls[3:]]
    assert uncorrected(controls, replies, [*liked, *judged]) == [controls[1], *controls[3:]]
