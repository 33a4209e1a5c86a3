"""Training of a version: the reward of the original model with its updated reward model, and the alarms of PPO."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from helpers.chat_models import random_policy

from rlchat.chat.learning.settings import Training
from rlchat.conversation import Conversation, Message
from rlchat.learn.records import finite
from rlchat.learn.stages import _alarms, _described_reward, _passes, _reward, _softened, _updated_row
from rlchat.models.model_file import PolicyBundle, RewardBundle, save_bundle
from rlchat.models.networks import RewardModel
from rlchat.rewards import LearnedQuality
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer


def learned(bundle: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": "rlchat.rewards.LearnedQuality", "init_args": {"bundle": bundle, **arguments}}


ENDING = {"class_path": "rlchat.rewards.MissingEnd", "init_args": {"weight": 0.5}}


@pytest.fixture
def original(workplace: Path, tokenizer: ChatTokenizer) -> PolicyBundle:
    policy = random_policy(tokenizer)
    for name in ("new.pt", "known.pt"):
        save_bundle(name, RewardBundle(RewardModel(policy.model.backbone), tokenizer, 64))
    return policy


def test_the_updated_reward_model_keeps_the_arguments_of_the_old_one(original: PolicyBundle) -> None:
    arguments = {"weight": 0.7, "clip": 2.5, "batch_size": 3, "device": "cpu", "base_model": "/gone"}
    original.about["reward"] = [ENDING, learned("/elsewhere/known.pt", **arguments), learned("known.pt", clip=9.0), 3]
    described = _described_reward(original, Path("chat.pt"))
    assert _updated_row(described) == 1
    missing, first, second = _reward(described, Path("new.pt")).factors.values()
    assert missing.describe() == ENDING | {"init_args": missing.describe()["init_args"]}
    assert isinstance(first, LearnedQuality)
    assert isinstance(second, LearnedQuality)
    assert (first.bundle, first.weight, first.clip, first.batch_size, first.device) == ("new.pt", 0.7, 2.5, 3, "cpu")
    assert (second.bundle, second.clip) == ("known.pt", 9.0)


def test_a_reward_model_that_is_gone_is_trained_anew_with_its_arguments(original: PolicyBundle) -> None:
    original.about["reward"] = [learned("gone.pt", clip=2.0), learned("known.pt")]
    described = _described_reward(original, Path("chat.pt"))
    assert _updated_row(described) == 1
    original.about["reward"] = [learned("gone.pt", clip=2.0)]
    (factor,) = _reward(_described_reward(original, Path("chat.pt")), Path("new.pt")).factors.values()
    assert isinstance(factor, LearnedQuality)
    assert (factor.bundle, factor.clip) == ("new.pt", 2.0)
    original.about["reward"] = [ENDING]
    assert [type(f).__name__ for f in _reward([ENDING], Path("new.pt")).factors.values()] == [
        "LearnedQuality",
        "MissingEnd",
    ]


@pytest.mark.parametrize(
    ("iterations", "truncated", "expected"),
    [(16, 0.0, (4, 0.5)), (1, 0.0, (1, 0.5)), (400, 0.0, (20, 0.5)), (16, 0.6, (4, 0.8)), (16, 0.95, (4, 1.0))],
)
def test_alarms_can_be_raised_in_a_short_run(iterations: int, truncated: float, expected: tuple[int, float]) -> None:
    watch = _alarms(iterations, truncated)
    assert (watch.patience, watch.max_truncated) == pytest.approx(expected)
    assert watch.patience <= iterations


@pytest.mark.parametrize(
    ("options", "rows", "batch", "passes"),
    [
        ({"part": "full"}, 24, 16, 12),
        ({"part": "full"}, 264, 16, 6),
        ({"part": "full"}, 2000, 16, 4),
        ({"part": "lora"}, 18, 4, 5),
        ({"part": "lora"}, 40, 4, 3),
        ({"part": "lora"}, 500, 4, 2),
        ({"part": "lora", "method": "ppo"}, 24, 16, 12),
        ({"part": "lora", "passes": 7}, 24, 4, 7),
        ({"part": "lora", "batch_size": 8}, 40, 8, 5),
    ],
)
def test_lora_makes_fewer_steps_from_small_batches(
    original: PolicyBundle, options: dict[str, Any], rows: int, batch: int, passes: int
) -> None:
    training = Training(**options, max_new_tokens=4).for_model(original)
    assert training.batch_size == batch
    assert _passes(rows, training) == passes


def test_a_thumb_down_has_a_limit() -> None:
    """The label loss of DPO is smallest at β · log ratio = log(q / (1 - q))."""
    replies = (Message("assistant", "a", quality=0.0), Message("assistant", "b", quality=1.0))
    bad, good = _softened(Conversation((Message("user", "Hello"),), replies)).references
    assert good.quality == 1
    assert bad.quality is not None
    assert math.log(bad.quality / (1 - bad.quality)) / Training().beta == pytest.approx(-2, abs=0.01)
    pair = Conversation(
        (Message("user", "Hello"),), (Message("assistant", "a", rank=0), Message("assistant", "b", rank=1))
    )
    assert _softened(pair) == pair


def test_figures_are_json() -> None:
    assert finite({"a": [1.5, float("inf")], "b": {"c": float("nan")}, "d": "x"}) == {
        "a": [1.5, None],
        "b": {"c": None},
        "d": "x",
    }
