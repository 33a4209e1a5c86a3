"""The invariants hold in runs of every kind, and each is broken by what it names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning as L
import pytest
import torch
from helpers.small_ppo import fit, ppo

from rlchat.ppo.checks.invariants import INVARIANTS, InvariantChecks
from rlchat.ppo.module import Iteration, PPOModule
from rlchat.rewards import Reply


class Checks(L.Callback):
    """Collects the residuals of each iteration and the invariants that do not hold."""

    def __init__(self) -> None:
        self.checks = InvariantChecks()
        self.residuals: list[dict[str, float]] = []
        self.broken: list[list[str]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, PPOModule)
        self.checks.start(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, PPOModule)
        assert pl_module.last_iteration is not None
        self.metrics = {k.removeprefix("train/"): float(v) for k, v in trainer.callback_metrics.items()}
        self.residuals.append(self.checks.residuals(pl_module, pl_module.last_iteration, self.metrics))
        self.broken.append(self.checks.broken(pl_module, pl_module.last_iteration, self.metrics))


def run(module: PPOModule, iterations: int, **options: Any) -> Checks:
    checks = Checks()
    fit(module, iterations, callbacks=[checks], **options)
    return checks


@pytest.mark.parametrize(
    "options",
    [
        {"kl_target": 0.1, "micro_batch_size": 3, "entropy_coef": 0.01},
        {"critic": "separate", "whiten_rewards": True, "kl_kind": "k3", "gamma": 0.9, "critic_warmup": 1},
        {"advantage": "rloo", "group_size": 2, "dual_clip": 2.0, "clip_eps_high": 0.3, "temperature": 0.8},
        {"advantage": "grpo", "group_size": 2, "kl_in": "loss", "kl_coef": 0.5},
        {"lam_critic": 1.0, "lam": 0.9},
        {"advantage": "reinforce_pp", "gamma": 0.9},
        {"adapter": "lora", "lora_rank": 2, "turns": 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_the_invariants_hold(encoding: str, options: dict[str, Any]) -> None:
    checks = run(ppo(encoding, **options), 3)
    assert checks.broken == [[], [], []]
    assert max(max(residuals.values()) for residuals in checks.residuals) < 1e-4
    measured = {*checks.residuals[0]} | {*checks.residuals[-1]}
    # Without a critic there are no values and returns, and kl_coef is fixed without kl_target.
    absent = {"value", "returns"} if "advantage" in options else set()
    assert measured == {*INVARIANTS} - absent - ({"kl_coef"} if "kl_target" not in options else set())


def test_the_invariants_hold_in_bfloat16(encoding: str) -> None:
    assert run(ppo(encoding), 3, precision="bf16-true").broken == [[], [], []]


@pytest.fixture(scope="module")
def done(encoding: str) -> tuple[PPOModule, Checks]:
    """A module after two iterations, with its checks."""
    module = ppo(encoding, kl_target=0.1)
    return module, run(module, 2)


def broken(done: tuple[PPOModule, Checks], iteration: Iteration, **metrics: float) -> list[str]:
    module, checks = done
    return checks.checks.broken(module, iteration, {**checks.metrics, **metrics})


def test_each_invariant_is_broken_by_what_it_names(done: tuple[PPOModule, Checks]) -> None:
    module, checks = done
    iteration = module.last_iteration
    assert iteration is not None
    rollout = iteration.rollout
    assert broken(done, iteration) == []
    for name in ("sampling", "ratio", "value", "gradient"):
        assert broken(done, iteration, **{f"{name}_residual": 0.01}) == [name]
        assert broken(done, iteration, **{f"{name}_residual": float("nan")}) == [name]
    assert broken(done, replace(iteration, scores=iteration.scores + 1)) == ["scores", "rewards"]
    assert broken(done, replace(iteration, rewards=iteration.rewards * 1.1)) == ["rewards", "returns"]
    assert broken(done, replace(iteration, returns=iteration.returns * 1.1)) == ["returns"]
    assert broken(done, replace(iteration, advantages=iteration.advantages * 1.1)) == ["advantages"]
    replies = [Reply("other", reply.tokens, reply.ended) for reply in rollout.replies]
    assert broken(done, replace(iteration, rollout=replace(rollout, replies=replies))) == ["responses"]
    wrong_way = checks.metrics["kl_coef"] - 1e-3 if module.kl_coef > checks.metrics["kl_coef"] else 1.0
    assert broken(done, iteration, kl_coef=wrong_way, kl=0.0 if wrong_way < 1 else 9.0)[-1] == "kl_coef"
    rounded = module.kl_coef * (1 + 1e-7)  # as a logged float32
    assert broken(done, iteration, kl_coef=rounded, kl=9.0) == []


def test_a_reference_that_changes_or_differs(encoding: str) -> None:
    module = ppo(encoding)
    with torch.no_grad():
        module.reference.backbone.head_weight.mul_(2)
    checks = run(module, 2)
    assert checks.broken == [["reference"], []]  # only the first iteration has to have a KL of 0
    assert module.last_iteration is not None
    with torch.no_grad():
        module.reference.backbone.head_weight[0, 0] += 1
    assert broken((module, checks), module.last_iteration) == ["frozen reference"]
    module.reference = module.model
    assert checks.checks.residuals(module, module.last_iteration, checks.metrics)["frozen reference"] > 1


def test_each_message_is_one_sentence() -> None:
    for invariant in INVARIANTS.values():
        text = f"iteration 1: {invariant.broken}; {invariant.fix}"
        assert len(text) < 450
        assert not text.endswith(".")
