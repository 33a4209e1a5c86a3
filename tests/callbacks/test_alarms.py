"""Alarms: each is raised once, for its own problem only."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.small_ppo import Letters, fit, ppo
from torch import Tensor

from rlchat.callbacks.alarms import Alarms
from rlchat.errors import UserError
from rlchat.rewards import Reward, TooLong

FINE = {
    "train/reward": 0.5,
    "train/kl": 3.0,
    "train/distinct_replies": 0.9,
    "train/truncated_fraction": 0.1,
    "train/explained_variance": 0.4,
}


class Run:
    """A run that logs given numbers."""

    def __init__(self, encoding: str, **options: Any) -> None:
        self.alarms = Alarms(**{"patience": 3, **options})
        self.module = ppo(encoding)
        self.trainer: Any = SimpleNamespace(
            callback_metrics={}, is_global_zero=True, world_size=1, sanity_checking=False
        )

    def iterate(self, times: int = 1, factors: dict[str, Tensor] | None = None, **changes: float) -> list[str]:
        metrics = {**FINE, **{f"train/{name}": value for name, value in changes.items()}}
        self.trainer.callback_metrics = {name: torch.tensor(value) for name, value in metrics.items()}
        for _ in range(times):
            self.module.iterations += 1
            rollout = SimpleNamespace(replies=[None] * 8)
            self.module.last_iteration = SimpleNamespace(  # type: ignore[assignment]
                rollout=rollout, factors=factors or {"rule": torch.arange(8.0)}
            )
            self.alarms.on_train_batch_end(self.trainer, self.module, None, None, 0)
        return self.alarms.raised

    def validate(self, reward: float) -> list[str]:
        self.trainer.callback_metrics["val/reward"] = torch.tensor(reward)
        self.alarms.on_validation_end(self.trainer, self.module)
        return self.alarms.raised


@pytest.fixture
def run(encoding: str) -> Run:
    return Run(encoding)


def test_no_alarm_in_a_healthy_run(run: Run) -> None:
    for step in range(6):
        run.iterate(3, reward=0.1 * step)
        assert run.validate(0.1 * step) == []


def test_kl_beyond_its_bound(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    assert run.iterate(kl=50.0) == []
    assert run.iterate(4, kl=51.0) == ["kl"]
    (record,) = caplog.records  # once
    assert record.message.startswith(
        "alarm: the KL to the reference model is 51 nats per response, above 50: raise --model.kl_coef"
    )


def test_identical_responses(run: Run) -> None:
    assert run.iterate(distinct_replies=2 / 8) == []
    assert run.iterate(distinct_replies=1 / 8) == ["collapse"]  # all eight are the same, though 1/8 is above 0.1


def test_noisy_problems_must_last(run: Run) -> None:
    for name, bad in (("truncated_fraction", 0.6), ("explained_variance", -0.1)):
        run.iterate(2, **{name: bad})
        run.iterate()
        run.iterate(2, **{name: bad})
    assert run.alarms.raised == []
    run.iterate(3, truncated_fraction=0.6)
    assert run.iterate(3, explained_variance=-0.1) == ["truncated", "critic"]


def test_explained_variance_may_be_negative_during_warmup(encoding: str) -> None:
    run = Run(encoding)
    run.module.options.critic_warmup = 5
    assert run.iterate(7, explained_variance=-1.0) == []
    assert run.iterate(1, explained_variance=-1.0) == ["critic"]


def test_a_factor_that_is_constant(run: Run) -> None:
    same, other = torch.zeros(8), torch.tensor([0.0] * 7 + [1.0])
    run.iterate(2, {"rule": torch.arange(8.0), "too_long": same})
    run.iterate(1, {"rule": torch.arange(8.0), "too_long": other})
    assert run.iterate(2, {"rule": torch.arange(8.0), "too_long": same}) == []
    assert run.iterate(1, {"rule": torch.arange(8.0), "too_long": same}) == ["reward/too_long"]


def test_reward_up_and_held_out_reward_down(run: Run) -> None:
    for step, held_out in enumerate([0.5, 0.9, 0.8, 0.7]):
        run.iterate(2, reward=0.1 * step)
        assert run.validate(held_out) == []
    run.iterate(2, reward=0.5)
    assert run.validate(0.6) == ["hacking"]


def test_held_out_reward_that_falls_with_the_training_reward_is_no_hacking(run: Run) -> None:
    for step in range(6):
        run.iterate(2, reward=-0.1 * step)
        assert run.validate(-0.1 * step) == []


def test_a_resumed_run_does_not_warn_twice(run: Run, encoding: str) -> None:
    run.iterate(3, kl=60.0)
    run.iterate(2, truncated_fraction=0.9)
    resumed = Run(encoding)
    resumed.alarms.load_state_dict(run.alarms.state_dict())
    assert resumed.iterate(1, truncated_fraction=0.9, kl=60.0) == ["kl", "truncated"]
    assert run.alarms.raised == ["kl"]  # the state is a copy


def test_a_real_run_without_kl_penalty(encoding: str, caplog: pytest.LogCaptureFixture) -> None:
    """Without a KL penalty the policy leaves its reference model; no response of eight bytes is ever too long."""
    module = ppo(encoding, reward=Reward([Letters(), TooLong()]), kl_coef=0.0)
    alarms = Alarms(patience=5, kl_bound=0.2)
    fit(module, 12, callbacks=[alarms])
    assert {"kl", "reward/too_long"} <= set(alarms.raised)
    assert "reward/letters" not in alarms.raised
    assert sum(record.name == "rlchat" for record in caplog.records) == len(alarms.raised)


@pytest.mark.parametrize("option", [{"kl_bound": 0.0}, {"min_distinct": 2.0}, {"max_truncated": -0.1}, {"patience": 0}])
def test_invalid_options_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"Alarms: {next(iter(option))} is"):
        Alarms(**option)
