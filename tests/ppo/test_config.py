"""The options of PPO: equal in the module and in the typed configuration; estimators from the registry."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import fields
from typing import get_type_hints

import pytest
import torch
from helpers.small_ppo import fit, ppo
from torch import Tensor

from rlchat.errors import UserError
from rlchat.ppo.advantages import ESTIMATORS, Advantages, EstimatorInputs, advantage_estimator
from rlchat.ppo.config import PPOConfig
from rlchat.ppo.module import PPOModule


def test_the_config_has_the_options_of_the_module() -> None:
    """By name and type, except for the reward, which is not a plain value."""
    arguments = set(inspect.signature(PPOModule).parameters) - {"reward"}
    assert {field.name for field in fields(PPOConfig)} == arguments
    module, config = get_type_hints(PPOModule.__init__), get_type_hints(PPOConfig)
    assert {name: module[name] for name in arguments} == {name: config[name] for name in arguments}


def test_options_are_typed_and_hyperparameters_are_plain_values(encoding: str) -> None:
    module = ppo(encoding, clip_eps=0.3)
    assert isinstance(module.options, PPOConfig)
    assert module.options.clip_eps == module.hparams["clip_eps"] == 0.3
    assert set(module.hparams) == {field.name for field in fields(PPOConfig)}
    assert all(isinstance(x, int | float | str | dict | None) for x in module.hparams.values())


@pytest.fixture
def to_go() -> Iterator[None]:
    """An estimator of a user: the rewards to go of each token; no critic, no groups."""

    @advantage_estimator("to_go", allows_turns=True)
    def estimate(inputs: EstimatorInputs) -> Advantages:
        rewards_to_go: Tensor = inputs.rewards.flip(1).cumsum(1).flip(1) * inputs.mask
        return Advantages(rewards_to_go, torch.zeros_like(rewards_to_go))

    yield
    del ESTIMATORS["to_go"]


@pytest.mark.usefixtures("to_go")
def test_a_registered_estimator_is_an_option(encoding: str) -> None:
    module = ppo(encoding, advantage="to_go")
    assert module.critic_kind == "none"
    rows = fit(module, 2)
    assert rows[0]["train/approx_kl"] > 0
    assert "train/value_loss" not in rows[0]
    with pytest.raises(UserError, match="expected one of gae, rloo, grpo, reinforce_pp, to_go"):
        ppo(encoding, advantage="ppo")
    with pytest.raises(UserError, match="has no critic"):
        ppo(encoding, advantage="to_go", critic="separate")
    with pytest.raises(UserError, match="does not support whiten_rewards"):
        ppo(encoding, advantage="to_go", whiten_rewards=True)


def test_an_estimators_name_is_unique() -> None:
    with pytest.raises(ValueError, match="'gae' is registered already"):
        advantage_estimator("gae")(lambda inputs: Advantages(inputs.rewards, inputs.values))
