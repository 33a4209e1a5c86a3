"""A reward model that is an adapter of the policy's base: it uses the policy's frozen weights, with the same scores."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import base_folder, ppo_with_adapter, reward_with_adapter, save
from helpers.small_ppo import QUESTIONS, fit, ppo
from torch import Tensor

from rlchat.conversation import Conversation, Message
from rlchat.errors import UserError
from rlchat.ppo.module import PPOModule
from rlchat.rewards import Factor, LearnedQuality, Reply, Reward

SHARED = "share the frozen weights"
PROMPTS = [Conversation((Message("user", text or "?"),)) for text in QUESTIONS]
REPLIES = [Reply(f"the answer {number} " * number, 5, True) for number in range(len(QUESTIONS))]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return base_folder(tmp_path_factory.mktemp("bases") / "base")


@pytest.fixture
def rewards(tmp_path: Path, base: str) -> str:
    return str(save(reward_with_adapter(base_model=base), tmp_path / "reward.pt"))


def learned(path: str, **options: Any) -> LearnedQuality:
    return LearnedQuality(path, clip=100.0, batch_size=3, **options)


def frozen_storages(module: torch.nn.Module) -> set[int]:
    return {p.untyped_storage().data_ptr() for p in module.parameters() if not p.requires_grad}


def shares(module: PPOModule, factor: Factor) -> bool:
    """Whether all weights of the reward model but its adapter and its head are those of the policy."""
    assert isinstance(factor, LearnedQuality)
    model = factor.reward_model.model
    own = {name: p for name, p in model.named_parameters() if ".lora_" not in name and "score_head" not in name}
    assert own
    theirs = frozen_storages(module.model)
    found = {p.untyped_storage().data_ptr() in theirs for p in own.values()}
    assert len(found) == 1
    return found.pop()


def scores(factor: LearnedQuality) -> Tensor:
    return factor(PROMPTS, REPLIES)


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_a_shared_reward_model_gives_the_scores_of_a_separate_one_before_and_after_training(
    base: str, rewards: str, caplog: pytest.LogCaptureFixture, critic: str
) -> None:
    separate, factor = learned(rewards), learned(rewards)
    expected = scores(separate)
    assert expected.std() > 0.1
    with caplog.at_level(logging.INFO, "rlchat"):
        module = ppo_with_adapter(base_model=base, reward=Reward([factor]), critic=critic, learning_rate=1e-2)
    assert f"{rewards} is an adapter of the policy's base model: they {SHARED}" in caplog.text
    assert shares(module, factor)
    assert not shares(module, separate)
    torch.testing.assert_close(scores(factor), expected, atol=1e-5, rtol=0)
    fit(module, 1)
    torch.testing.assert_close(scores(factor), expected, atol=1e-5, rtol=0)
    assert shares(module, factor)
    assert not any(p.requires_grad for p in factor.reward_model.model.parameters())


def test_a_run_is_the_same_with_a_shared_and_with_a_separate_reward_model(base: str, rewards: str) -> None:
    rows = []
    for device in ("auto", "cpu"):  # a reward model with a device of its own is separate
        factor = learned(rewards, device=device)
        torch.manual_seed(0)
        module = PPOModule(base_model=base, adapter="lora", reward=Reward([factor]), max_new_tokens=8, minibatches=1)
        assert shares(module, factor) == (device == "auto")
        rows.append(fit(module, 2))
    for one, other in zip(*rows, strict=True):
        assert one["reward/learned_quality"] == pytest.approx(other["reward/learned_quality"], abs=1e-5)
        assert one["train/kl"] == pytest.approx(other["train/kl"], abs=1e-5)


def test_policy_and_reward_model_can_be_adapters_of_one_model_file(tmp_path: Path, base: str) -> None:
    sft = str(save(ppo_with_adapter(base_model=base), tmp_path / "sft.pt"))
    path = str(save(reward_with_adapter(init_from=sft), tmp_path / "reward.pt"))
    separate, factor = learned(path), learned(path)
    assert shares(ppo_with_adapter(init_from=sft, reward=Reward([factor])), factor)
    torch.testing.assert_close(scores(factor), scores(separate), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("reward_options", "options"),
    [
        ({"chat_format": "rlchat"}, {}),
        ({}, {"adapter": None, "merge_adapter": True, "train_layers": 1}),
        ({}, {"merge_adapter": True, "new_embeddings": True}),
    ],
    ids=["another tokenizer", "no adapter", "other embeddings"],
)
def test_a_reward_model_with_other_weights_stays_separate(
    tmp_path: Path, base: str, reward_options: dict[str, Any], options: dict[str, Any]
) -> None:
    path = str(save(reward_with_adapter(base_model=base, **reward_options), tmp_path / "reward.pt"))
    factor = learned(path)
    expected = scores(factor)
    module = ppo_with_adapter(base_model=base, reward=Reward([factor]), **options)
    assert not shares(module, factor)
    assert torch.equal(scores(factor), expected)


def test_a_merged_reward_model_and_one_of_another_base_stay_separate(
    tmp_path: Path, base: str, encoding: str, rewards: str
) -> None:
    merged = str(save(reward_with_adapter(base_model=base), tmp_path / "merged.pt", merge_adapter=True))
    other = base_folder(tmp_path / "other", seed=1)
    another = str(save(reward_with_adapter(base_model=other), tmp_path / "another.pt"))
    factors = [learned(merged), learned(another)]
    module = ppo_with_adapter(base_model=base, reward=Reward(factors))
    assert not any(shares(module, factor) for factor in factors)
    factor = learned(rewards)
    assert not shares(ppo(encoding, adapter="lora", reward=Reward([factor])), factor)  # random weights


@pytest.mark.parametrize("adapter", ["lora", None])
def test_a_reward_model_whose_base_is_gone_stops_the_run_before_it_starts(
    tmp_path: Path, base: str, adapter: str | None
) -> None:
    gone = base_folder(tmp_path / "gone", seed=1)
    path = str(save(reward_with_adapter(base_model=gone), tmp_path / "reward.pt"))
    shutil.rmtree(gone)
    with pytest.raises(UserError, match=r"the base model .*gone that it belongs to was not found"):
        PPOModule(base_model=base, adapter=adapter, reward=Reward([learned(path)]), max_new_tokens=8)


def test_no_base_is_loaded_for_a_shared_reward_model(base: str, rewards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = Reward([learned(rewards)])
    monkeypatch.setattr("rlchat.models.model_file.open_base_model", lambda *_: pytest.fail("a second trunk"))
    assert shares(ppo_with_adapter(base_model=base, reward=reward), reward.factors["learned_quality"])


def test_the_adapter_of_the_reward_model_follows_the_precision_of_the_policy(base: str, rewards: str) -> None:
    expected, factor = scores(learned(rewards)), learned(rewards)
    module = ppo_with_adapter(base_model=base, reward=Reward([factor]))
    fit(module, 1, precision="bf16-true")
    model = factor.reward_model.model
    assert {p.dtype for p in model.backbone.parameters()} == {torch.bfloat16}
    assert model.mean.dtype == model.score_head.weight.dtype == torch.float32
    torch.testing.assert_close(scores(factor), expected, atol=0.2, rtol=0.1)
