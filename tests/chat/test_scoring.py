"""The reward of a model file: scores worked out by hand, factors and reward models found or reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.chat_models import random_policy

from rlchat.chat.scoring import RewardScorer
from rlchat.conversation import Check, Conversation, Message
from rlchat.errors import UserError
from rlchat.models.backbones import Backbone
from rlchat.models.model_file import PolicyBundle, RewardBundle, save_bundle
from rlchat.models.networks import RewardModel
from rlchat.rewards import Reply
from rlchat.rewards.learned import LearnedQuality
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

PROMPT = Conversation((Message("user", "Hello"),))
LEARNED = {"class_path": "rlchat.LearnedQuality", "init_args": {"bundle": "checkpoints/judge.pt", "weight": 2.0}}
TOO_SHORT = {"class_path": "rlchat.rewards.TooShort", "init_args": {"weight": 0.5, "min_words": 4}}
NO_END = {"class_path": "rlchat.rewards.MissingEnd"}


def bundle(tokenizer: ChatTokenizer, *reward: Any) -> PolicyBundle:
    policy = random_policy(tokenizer)
    policy.about["reward"] = list(reward)
    return policy


def save_reward_model(tokenizer: ChatTokenizer, path: Path) -> None:
    torch.manual_seed(0)
    model = RewardModel(
        Backbone({"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1}, tokenizer.vocab_size, 64)
    )
    torch.nn.init.normal_(model.score_head.weight)
    save_bundle(path, RewardBundle(model, tokenizer, 64))


def test_scores_worked_out_by_hand(byte_tokenizer: ChatTokenizer) -> None:
    scorer = RewardScorer(bundle(byte_tokenizer, TOO_SHORT, NO_END), "rl.pt")
    found = scorer.breakdown([PROMPT, PROMPT], [Reply("One", 3, False), Reply("One two three four", 9, True)])
    assert found == [{"too_short": -0.375, "missing_end": -1.0}, {"too_short": 0.0, "missing_end": 0.0}]  # ½·(¼ - 1)
    assert scorer.left_out == {}


@pytest.mark.parametrize("place", ["there", "beside"])
def test_the_reward_model_is_found(
    byte_tokenizer: ChatTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("checkpoints/judge.pt") if place == "there" else Path("moved/judge.pt")
    save_reward_model(byte_tokenizer, path)
    found = RewardScorer(bundle(byte_tokenizer, LEARNED), "moved/rl.pt").breakdown([PROMPT], [Reply("Hi", 3, True)])
    (score,) = LearnedQuality(str(path))([PROMPT], [Reply("Hi", 3, True)]).tolist()
    assert found == [{"learned_quality": pytest.approx(2 * score)}]
    assert score != 0


def test_a_missing_reward_model(byte_tokenizer: ChatTokenizer) -> None:
    with pytest.raises(UserError, match=r"reward model not found: copy it to checkpoints/judge\.pt or m"):
        RewardScorer(bundle(byte_tokenizer, LEARNED), "m/rl.pt")


def test_a_factor_on_the_import_path_is_found(
    byte_tokenizer: ChatTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "mine_scoring.py").write_text(
        """
from rlchat.rewards import ReplyFactor

class Polite(ReplyFactor):
    def score(self, prompt, reply):
        return float("please" in reply.text)

class Fails(ReplyFactor):
    def score(self, prompt, reply):
        raise KeyError("no score")

class NotAFactor:
    def __init__(self):
        raise SystemExit("constructed")
"""
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    polite = {"class_path": "mine_scoring.Polite", "init_args": {"weight": 2.0}}
    fails = {"class_path": "mine_scoring.Fails"}
    scorer = RewardScorer(bundle(byte_tokenizer, NO_END, polite, fails), "rl.pt")
    file = tmp_path / "mine_scoring.py"
    assert f"the reward uses your class mine_scoring.Polite from {file}" in caplog.text
    for _ in range(2):  # the factor that failed is not used again
        found = scorer.breakdown([PROMPT], [Reply("please", 3, True)])
        assert found == [{"missing_end": 0.0, "polite": 2.0}]
        assert scorer.left_out == {
            "fails": "reward factor 'fails' (mine_scoring.Fails) failed: KeyError: 'no score'; see line 10 of "
            "mine_scoring.py"
        }
    others = ["nowhere.Factor", "mine_scoring.NotAFactor", "mine_scoring.Absent", "TooShort", "rlchat.rewards.Factor"]
    scorer = RewardScorer(bundle(byte_tokenizer, NO_END, *({"class_path": path} for path in others)), "rl.pt")
    assert list(scorer.left_out) == others
    assert list(scorer.reward.factors) == ["missing_end"]
    assert scorer.left_out["nowhere.Factor"] == (
        "cannot import nowhere: it is not on the import path; add its folder to PYTHONPATH"
    )
    assert scorer.left_out["mine_scoring.NotAFactor"] == "mine_scoring.NotAFactor is not a reward factor"
    with pytest.raises(UserError, match=r"no factor of the reward can be used: nowhere\.Factor \(cannot import"):
        RewardScorer(bundle(byte_tokenizer, {"class_path": "nowhere.Factor"}), "rl.pt")
    with pytest.raises(UserError, match=r"no factor of the reward can be used: fails \(reward factor 'fails'"):
        RewardScorer(bundle(byte_tokenizer, fails), "rl.pt").breakdown([PROMPT], [Reply("a", 1, True)])


@pytest.mark.parametrize(
    ("described", "why"),
    [
        ([], "the model file contains no reward; only models trained with PPO have one"),
        ([3], "the reward in this model file is damaged; train the model again"),
        ([{"init_args": {}}], "the reward in this model file is damaged; train the model again"),
        ([{"class_path": "rlchat.rewards.TooShort", "init_args": 3}], "the reward in this model file is damaged;"),
        ([{**TOO_SHORT, "init_args": {"length": 1}}], r"TooShort \(cannot be constructed: .*'length'"),
        (
            [{**TOO_SHORT, "init_args": {"min_words": 0}}],
            r"invalid value 0 for TooShort\.min_words: expected a positive integer",
        ),
    ],
)
def test_an_invalid_description_of_the_reward(byte_tokenizer: ChatTokenizer, described: list[Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        RewardScorer(bundle(byte_tokenizer, *described), "rl.pt")


@pytest.mark.parametrize("hidden_dim", [0, 3])
def test_the_critic_values_the_prompt(byte_tokenizer: ChatTokenizer, hidden_dim: int) -> None:
    policy = random_policy(byte_tokenizer, hidden_dim=hidden_dim)
    policy.about["reward"] = [NO_END]
    scorer = RewardScorer(policy, "rl.pt")
    assert scorer.value(PROMPT) is None  # a head of zeros is one that nobody trained
    with torch.no_grad():
        for parameter in policy.model.value_head.parameters():
            parameter.normal_()
    ids = torch.tensor([byte_tokenizer.render_prompt(PROMPT).ids])
    hidden = policy.model(ids, torch.ones_like(ids))
    assert scorer.value(PROMPT) == pytest.approx(policy.model.value_head(hidden[0, -1]).item())


VERIFIED = {"class_path": "rlchat.rewards.Verified"}


def test_a_factor_that_cannot_score_a_response_says_so(byte_tokenizer: ChatTokenizer) -> None:
    asked = Conversation(PROMPT.messages, check=Check(("Hi",)))
    scorer = RewardScorer(bundle(byte_tokenizer, NO_END, VERIFIED), "rl.pt")
    found = scorer.breakdown([asked, PROMPT], [Reply("Hi", 3, True)] * 2)
    assert found == [{"missing_end": 0.0, "verified": 1.0}, {"missing_end": 0.0}]
    assert (scorer.not_scored(asked), scorer.left_out) == ({}, {})
    assert scorer.not_scored(PROMPT) == {"verified": "the prompt has no answer to check"}
    alone = RewardScorer(bundle(byte_tokenizer, VERIFIED), "rl.pt")
    with pytest.raises(
        UserError, match=r"no factor of the reward can score this response: verified \(the prompt has no"
    ):
        alone.score_text(PROMPT, "Hi")


def test_what_the_factors_of_a_file_may_not_do(
    byte_tokenizer: ChatTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "functions_of_a_file.py").write_text(
        "from os import system\n\ndef polite(prompt, reply):\n    return 1\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    def why_not(kind: str, **init_args: Any) -> str | None:
        row = {"class_path": f"rlchat.rewards.{kind}", "init_args": init_args}
        return RewardScorer(bundle(byte_tokenizer, NO_END, row), "rl.pt").left_out.get(f"rlchat.rewards.{kind}")

    assert why_not("FunctionReward", function="functions_of_a_file.polite") is None
    assert f"your function functions_of_a_file.polite from {tmp_path / 'functions_of_a_file.py'}" in caplog.text
    for path in ("os.system", "nowhere_at_all.polite", "polite"):
        assert why_not("FunctionReward", function=path) == (
            f"cannot import the function {path}: its module is not on the import path"
        )
    refused = "functions_of_a_file.system is not a function that functions_of_a_file defines"
    assert why_not("FunctionReward", function="functions_of_a_file.system") == refused
    assert why_not("HTTPReward", url="http://localhost:1/") is None
    refused = "it would send the conversation to a.b; to allow it, set the environment variable RLCHAT_REWARD_HOSTS=a.b"
    assert why_not("HTTPReward", url="https://a.b/score") == refused
    monkeypatch.setenv("RLCHAT_REWARD_HOSTS", "c.d,a.b")
    assert why_not("HTTPReward", url="https://a.b/score") is None
    assert why_not("HFReward", model="m") is None
    assert (why_not("HFReward", model="m", trust_remote_code=True) or "").startswith("the model m runs code that comes")
