"""`PPOModule.load_from_checkpoint`: the reward is the one of the run, and no other file is needed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.small_ppo import Letters, ppo, prompts, serve, trainer

from rlchat.errors import UserError
from rlchat.ppo.module import PPOModule
from rlchat.rewards import ReplyFactor, Reward, TooShort
from rlchat.rewards.described import describe_fully


class Listed(ReplyFactor):
    """A factor with an argument that is a list."""

    def __init__(self, endings: list[str], weight: float = 1.0) -> None:
        super().__init__(weight)
        self.endings = endings

    def score(self, prompt: Any, reply: Any) -> float:
        return float(reply.text.endswith(tuple(self.endings)))


class Matching(ReplyFactor):
    """A factor whose attribute is not a plain value."""

    def __init__(self, pattern: str) -> None:
        super().__init__()
        self.pattern = re.compile(pattern)

    def score(self, prompt: Any, reply: Any) -> float:
        return float(bool(self.pattern.search(reply.text)))


class Halved(Reward):
    """A reward that is not a plain sum of factors."""

    def breakdown(self, *batch: Any) -> dict[str, Any]:
        return {name: value / 2 for name, value in super().breakdown(*batch).items()}


def trained(module: PPOModule, folder: Path) -> L.Trainer:
    """The trainer of one iteration of ``module``, whose checkpoint is ``run.ckpt``."""
    run = trainer()
    run.fit(module, serve([prompts(module.tokenizer)]))
    run.save_checkpoint(folder / "run.ckpt")
    return run


@pytest.mark.parametrize("critic", ["shared", pytest.param("separate", marks=pytest.mark.slow)])
def test_a_checkpoint_is_loaded_with_its_reward_and_without_other_files(
    encoding: str, tmp_path: Path, critic: str
) -> None:
    first = ppo(encoding, hidden_dim=4)
    trained(first, tmp_path)
    start = tmp_path / "start.pt"
    first.save_bundle(start)
    reward = Reward([TooShort(weight=0.25, min_words=7), Letters(), Listed(["a", "b"], weight=2.0)])
    module = PPOModule(init_from=str(start), critic=critic, reward=reward, max_new_tokens=8, learning_rate=1e-2)
    trained(module, tmp_path)
    start.unlink()
    loaded = PPOModule.load_from_checkpoint(tmp_path / "run.ckpt")
    assert loaded.reward.describe() == reward.describe()
    assert loaded.hparams == module.hparams
    assert loaded.options == module.options
    assert loaded.iterations == 1
    for name, weight in module.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name
    batch = [prompts(module.tokenizer)]
    assert trainer().validate(loaded, serve(batch), verbose=False) == trainer().validate(
        module, serve(batch), verbose=False
    )


@pytest.mark.parametrize(
    ("reward", "argument"),
    [(Reward([Letters(), Matching("a")]), "Matching.* pattern"), (Halved([Letters()]), "Halved.* factors")],
    ids=["factor", "reward"],
)
def test_a_reward_that_cannot_be_rebuilt_is_an_error(
    encoding: str, tmp_path: Path, reward: Reward, argument: str
) -> None:
    trained(ppo(encoding, reward=reward), tmp_path)
    with pytest.raises(
        UserError, match=rf"cannot be rebuilt: .*{argument.partition('.* ')[2]} are not known; pass rew"
    ):
        PPOModule.load_from_checkpoint(tmp_path / "run.ckpt")
    with pytest.raises(UserError, match=argument):
        PPOModule.load_from_checkpoint(tmp_path / "run.ckpt")
    assert PPOModule.load_from_checkpoint(tmp_path / "run.ckpt", reward=reward).reward is reward


def test_a_class_that_no_longer_exists_is_an_error(encoding: str, tmp_path: Path) -> None:
    trained(ppo(encoding, reward=Reward([Letters()])), tmp_path)
    content = torch.load(tmp_path / "run.ckpt", weights_only=True)
    content["rlchat"]["reward"][0]["class_path"] = "gone_since.Letters"
    torch.save(content, tmp_path / "run.ckpt")
    with pytest.raises(UserError, match=r"run\.ckpt: cannot import gone_since: .*; pass reward="):
        PPOModule.load_from_checkpoint(tmp_path / "run.ckpt")


def test_every_factor_of_rlchat_describes_all_of_its_arguments() -> None:
    assert [row["unknown"] for row in describe_fully(Reward())] == [[]] * 7


def test_a_checkpoint_without_a_description_needs_a_reward(encoding: str, tmp_path: Path) -> None:
    trained(ppo(encoding), tmp_path)
    content = torch.load(tmp_path / "run.ckpt", weights_only=True)
    for name in ("reward", "model"):  # as version 0.1 wrote it
        del content["rlchat"][name]
    torch.save(content, tmp_path / "old.ckpt")
    with pytest.raises(UserError, match="does not describe its reward; pass reward="):
        PPOModule.load_from_checkpoint(tmp_path / "old.ckpt")
    assert PPOModule.load_from_checkpoint(tmp_path / "old.ckpt", reward=Reward([Letters()])).iterations == 1
