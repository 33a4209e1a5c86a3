"""`rlchat demo --real --rankings`: its data, its figures by hand, and all three stages on a tiny model."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from demo.real.test_demo import screen_of, stand_in
from demo.real.test_goal_and_data import DATA, plain

from rlchat.__main__ import main
from rlchat.conversation import Check, Conversation, Message
from rlchat.data.formats import ranked_pairs
from rlchat.demo.real.measure import Sampled, read_data
from rlchat.demo.real.pairs import correct_pairs, length_score, pair_figures, read_rankings, share_interval
from rlchat.demo.real.rankings import Replies, scored_beside
from rlchat.rewards import MissingEnd, Reply, Reward
from rlchat.rewards.base import ReplyFactor
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

TRAIN, HELD_OUT = "rankings.jsonl", "held_out_rankings.jsonl"


def ranked(*texts: str) -> Conversation:
    """A prompt with replies, best first."""
    replies = tuple(Message("assistant", text, rank=rank) for rank, text in enumerate(texts))
    return Conversation((Message("user", "Hello"),), references=replies)


# ---- data ------------------------------------------------------------------------------------------------------------


def test_many_prompts_have_a_ranking() -> None:
    train, held_out = read_rankings(TRAIN), read_rankings(HELD_OUT)
    assert (len(train), len(held_out)) == (167, 63)
    assert [sum(len(ranked_pairs(prompt)) for prompt in found) for found in (train, held_out)] == [404, 121]
    for prompt in train + held_out:
        assert all(len(" ".join(m.text for m in (*prompt.messages, r))) <= 1600 for r in prompt.references)
        assert all(reply.quality is None or 0 <= reply.quality <= 1 for reply in prompt.references)


def test_no_user_message_of_a_held_out_file_is_in_a_training_file() -> None:
    def asked(name: str) -> set[str]:
        """All user messages of a file, also those before the last."""
        messages = {m for prompt in read_data(name) for m in prompt.messages if m.role == "user"}
        return plain([Conversation((message,)) for message in messages])

    trained = asked(TRAIN) | asked("train.jsonl") | asked("facts.jsonl")
    assert not trained & (asked(HELD_OUT) | asked("held_out.jsonl") | asked("control.jsonl"))


def test_no_message_is_in_both_files_and_every_message_leads_to_a_first_one() -> None:
    rows = {name: [json.loads(line) for line in (DATA / name).open(encoding="utf-8")] for name in (TRAIN, HELD_OUT)}
    ids = {name: {row["message_id"] for row in found} for name, found in rows.items()}
    assert not ids[TRAIN] & ids[HELD_OUT]
    for name, found in rows.items():
        assert len(ids[name]) == len(found)
        assert all(row["parent_id"] in ids[name] | {None} for row in found)
        assert {key for row in found for key in row} == {"message_id", "parent_id", "role", "text", "rank", "labels"}


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_pairs_by_hand() -> None:
    """Of "ccc" > "bb" > "a", length gets all three pairs; of "x" > "yy" > "z", only "yy" > "z"; the tie is wrong."""
    correct, pairs = correct_pairs(
        [ranked("ccc", "bb", "a"), ranked("x", "yy", "z"), ranked("same", "size")], length_score
    )
    assert correct.tolist() == [3, 1, 0]
    assert pairs.tolist() == [3, 3, 1]


def test_the_share_is_of_pairs_and_certain_figures_have_no_width() -> None:
    figures = pair_figures([ranked("ccc", "bb", "a"), ranked("x", "yy", "z")], length_score, seed=0)
    assert figures["accuracy"] == pytest.approx(4 / 6, abs=1e-4)
    assert figures["interval"] == [pytest.approx(1 / 3, abs=1e-4), 1.0]
    assert pair_figures([ranked("bb", "a")] * 5, length_score, seed=0) == {"accuracy": 1.0, "interval": [1.0, 1.0]}


def test_the_interval_is_that_of_a_share_of_prompts_with_one_pair_each() -> None:
    """100 prompts, 60 of them correct: 0.6 ± 1.96 √(0.6 · 0.4 / 100) = 0.504 to 0.696."""
    correct = torch.tensor([1.0] * 60 + [0.0] * 40)
    low, high = share_interval(correct, torch.ones(100), seed=0)
    assert low == pytest.approx(0.504, abs=0.01)
    assert high == pytest.approx(0.696, abs=0.01)


def test_pairs_that_agree_within_a_prompt_widen_the_interval() -> None:
    once = share_interval(torch.tensor([1.0, 0.0] * 20), torch.ones(40), seed=0)
    thrice = share_interval(torch.tensor([3.0, 0.0] * 20), torch.full((40,), 3.0), seed=0)
    assert thrice == once  # three times the pairs, and not more information


class LearnedQuality(ReplyFactor):
    """A stand-in for the reward model: one point per character."""

    def score(self, prompt: Conversation, reply: Reply) -> float:
        return float(len(reply.text))


def sampled(text: str, *, ended: bool, check: Check | None = None) -> Sampled:
    return Sampled(Conversation((Message("user", "Hello"),), check=check), [1], [2], Reply(text, 2, ended))


def test_figures_of_a_model_by_hand() -> None:
    asked = Check(("Paris",))
    control = [sampled("Paris", ended=True, check=asked), sampled("Rome", ended=True, check=asked)]
    replies = Replies([sampled("a bc", ended=True), sampled("de", ended=False)], control, 7.0)
    assert replies.figures(Reward([LearnedQuality(), MissingEnd(weight=1.0)])) == {
        "perplexity": 7.0,
        "reward": (4 + 2 - 1) / 2,
        "score": 3.0,
        "words": 1.5,
        "truncated": 0.5,
        "control_correct": 1,
    }


def test_replies_are_beside_each_other_with_their_scores() -> None:
    rows = scored_beside([sampled("ab", ended=True)], [sampled("abc", ended=True)], length_score)
    assert rows == [
        {"prompt": "Hello", "before": {"reply": "ab", "score": 2.0}, "after": {"reply": "abc", "score": 3.0}}
    ]


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_three_stages_run(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    for package in ("gguf", "peft"):
        pytest.importorskip(package)
    screen = screen_of(tmp_path, stand_in(tmp_path / "site", tokenizer, layers=10, max_length=320), "--rankings")
    report = json.loads((tmp_path / "checkpoints" / "rankings_report.json").read_text())
    for stage in ("sft", "reward", "ppo"):
        assert report["training"][stage]["seconds"] > 0
        assert len(re.findall(rf"^\$ rlchat fit --config demo/rankings-{stage} .*=3$", screen, re.MULTILINE)) == 1
    assert report["training"]["ppo"]["iterations"] == 2
    assert report["cpu_seconds"] > 0
    assert set(report["policies"]["ppo"]) == {*report["policies"]["sft"], "kl"}
    assert set(report["policies"]["base"]) == set(report["policies"]["sft"])
    assert math.isfinite(report["policies"]["ppo"]["kl"])
    assert report["pairs"]["prompts"] == len(report["replies"]) == len(report["control"]) == 4
    low, high = report["pairs"]["reward_model"]["interval"]
    assert 0 <= low <= report["pairs"]["reward_model"]["accuracy"] <= high <= 1
    shown = [f"{report['policies'][name]['perplexity']:.3f}" for name in ("base", "sft", "ppo")]
    assert re.search(r" +│ +".join(["perplexity on human replies", *map(re.escape, shown)]), screen)
    assert f"Of {report['pairs']['pairs']} held-out pairs of replies to 4 prompts" in screen
    assert "Traceback" not in screen


def test_rankings_need_the_real_model(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--rankings"]) == 2
    assert "--rankings applies only to a real chat model; add --real" in capsys.readouterr().err
    assert not list(workplace.iterdir())
