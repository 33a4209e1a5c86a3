"""Alarms: each is raised once, and only for its own problem."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.small_ppo import QUESTIONS, Letters, fit, ppo, prompts, sequences, serve, trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from rlchat.callbacks.alarms import Alarms, reward_hacking
from rlchat.callbacks.best_model import BestModel
from rlchat.conversation import Conversation
from rlchat.errors import UserError
from rlchat.rewards import Reply, ReplyFactor, Reward, TooLong

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
        self.saver = BestModel()
        self.broken: list[str] = []  # invariants
        self.alarms.invariants = SimpleNamespace(broken=lambda *_: self.broken)  # type: ignore[assignment]
        self.trainer: Any = SimpleNamespace(
            callback_metrics={},
            is_global_zero=True,
            world_size=1,
            sanity_checking=False,
            checkpoint_callbacks=[self.saver],
            fit_loop=SimpleNamespace(total_batch_idx=0),
        )
        self.module.trainer = self.trainer

    def iterate(self, times: int = 1, factors: dict[str, Tensor] | None = None, **changes: float) -> list[str]:
        metrics = {**FINE, **{f"train/{name}": value for name, value in changes.items()}}
        self.trainer.callback_metrics = {name: torch.tensor(value) for name, value in metrics.items()}
        for _ in range(times):
            self.module.iterations += 1
            rollout = SimpleNamespace(replies=[None] * 8, **self.sampled())
            if self.learns:
                self.learn()
            self.module.last_iteration = SimpleNamespace(  # type: ignore[assignment]
                rollout=rollout, advantages=torch.ones(2, 1), factors=factors or {"rule": torch.arange(8.0)}
            )
            self.alarms.on_train_batch_end(self.trainer, self.module, None, None, 0)
        return self.alarms.raised

    learns = True

    def learn(self) -> None:
        """Changes the policy, as every update does."""
        with torch.no_grad():
            self.module.model.backbone.head_weight[0, 0] += 1.0

    def sampled(self) -> dict[str, Tensor]:
        """Two responses of one token each, which differ in each iteration; each token has a surprisal of 1 nat."""
        tokens = torch.tensor([[2 * self.module.iterations], [2 * self.module.iterations + 1]])
        mask = torch.ones(2, 1, dtype=torch.bool)
        return {
            "ids": torch.cat([tokens, tokens], 1),
            "sampled": torch.tensor([[False, True]] * 2),
            "response_index": torch.tensor([[0], [1]]),
            "response_mask": mask,
            "old_logprobs": -torch.ones(2, 1),
            "entropy": torch.ones(2, 1),
        }

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


def test_weights_that_do_not_change(run: Run) -> None:
    run.learns = False
    assert run.iterate(3, learning_rate=1e-3, grad_norm=0.5) == []  # the first one has nothing to compare with
    assert run.iterate(1, learning_rate=1e-3, grad_norm=0.5) == ["frozen"]


def test_weights_need_not_change_without_a_learning_rate_or_in_the_warmup_of_the_critic(encoding: str) -> None:
    run = Run(encoding)
    run.learns, run.module.options.critic_warmup = False, 5
    assert run.iterate(5, learning_rate=1e-3, grad_norm=0.5) == []
    assert run.iterate(4, learning_rate=0.0, grad_norm=0.5) == []


@pytest.mark.parametrize(
    ("alarm", "good", "bad"),
    [
        ("large update", {"approx_kl": 0.5}, {"approx_kl": 0.51}),
        ("far critic", {"explained_variance": -10.0}, {"explained_variance": -10.1}),
    ],
)
def test_signs_of_an_unstable_update_must_show_three_times(
    encoding: str, alarm: str, good: dict[str, float], bad: dict[str, float]
) -> None:
    run = Run(encoding, patience=20)
    assert run.iterate(3, **good) == []
    assert run.iterate(2, **bad) == []
    assert run.iterate(1, **good) == []
    assert run.iterate(3, **bad) == [alarm]


def test_repeated_random_numbers(run: Run) -> None:
    same = {**run.sampled(), "old_logprobs": torch.full((2, 1), -30.0), "entropy": torch.full((2, 1), 30.0)}
    run.sampled = lambda: same  # type: ignore[method-assign]
    assert run.iterate() == []
    assert run.iterate() == ["repetition"]  # 60 - 2 - 2·log(30) = 51 nats


def test_responses_without_a_header_before_them(run: Run) -> None:
    run.alarms._header = [7]
    tokens = {"ids": torch.tensor([[7, 1], [7, 2]]), **{k: v for k, v in run.sampled().items() if k != "ids"}}
    run.sampled = lambda: tokens  # type: ignore[method-assign]
    assert run.iterate() == []
    tokens["ids"] = torch.tensor([[7, 1], [6, 2]])
    assert run.iterate() == ["prompts"]


def test_tokens_that_are_less_surprising_than_the_entropy(run: Run) -> None:
    """Greedy sampling from two tokens of probability 1/2 would report a log-prob of 0. 2·n tokens count as a variance
    of 2 each: (log 2)·2n / √(4n) is 5.96 for n = 74, and 6.003 for n = 75.
    """
    certain = {"old_logprobs": torch.zeros(2, 1), "entropy": torch.full((2, 1), math.log(2))}
    sampled = run.sampled
    run.sampled = lambda: {**sampled(), **certain}  # type: ignore[method-assign]
    assert run.iterate(74) == []
    assert run.iterate(1) == ["surprisal"]
    resumed = Alarms()
    assert resumed.state_dict()["surprisal"] == [0.0, 0.0, 0.0, 0.0]
    resumed.load_state_dict(run.alarms.state_dict())
    assert resumed.state_dict()["surprisal"] == pytest.approx(
        [-150 * math.log(2), 150 * math.log(2) ** 2, 300.0, 150.0]
    )


def test_a_broken_invariant_is_an_alarm(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.broken = ["ratio", "rewards"]
    assert run.iterate(2) == ["ratio", "rewards"]
    first, second = (record.message for record in caplog.records)
    assert first.startswith("alarm: iteration 1: the ratio is not 1 before the first optimizer step")
    assert "; compute old log-probs without dropout" in first
    assert "token_rewards(); check the sign" in second


def test_strict_checks_stop_at_the_first_broken_invariant_only(encoding: str) -> None:
    run = Run(encoding, checks="strict")
    assert run.iterate(3, explained_variance=-20.0) == ["far critic", "critic"]  # signs do not stop a run
    assert not run.saver._signals.has_error
    run.broken = ["ratio", "rewards"]
    assert run.iterate()[2:] == []  # a resumed run that only warns has to warn of it
    assert run.alarms.state_dict()["notes"][-1]["what"] == "ratio"
    with pytest.raises(UserError, match=r"^iteration 4: the ratio is not 1 .*; compute .*, or set --checks warn$"):
        run.saver._signals.stop(run.saver._signals.agreed(run.module))


def test_strict_checks_stop_at_once_without_best_model(encoding: str) -> None:
    run = Run(encoding, checks="strict")
    run.trainer.checkpoint_callbacks = []
    run.broken = ["ratio"]
    with pytest.raises(UserError, match=r"^iteration 1: the ratio is not 1"):
        run.iterate()


def test_kl_above_its_bound(encoding: str, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(encoding, kl_bound=50.0)
    assert run.iterate(kl=50.0) == []
    assert run.iterate(4, kl=51.0) == ["kl"]
    (record,) = caplog.records  # once
    assert record.message.startswith(
        "alarm: the KL to the reference model is 51 nats per response, above 50: raise --model.kl_coef"
    )


@pytest.mark.parametrize(("response_length", "bound"), [(8.0, 10.0), (24.0, 12.0), (100.0, 50.0)])
def test_the_usual_kl_grows_with_the_responses(run: Run, response_length: float, bound: float) -> None:
    assert run.iterate(kl=bound, response_length=response_length) == []
    assert run.iterate(kl=bound + 0.1, response_length=response_length) == ["kl"]


def test_identical_responses(run: Run) -> None:
    assert run.iterate(distinct_replies=2 / 8) == []
    assert run.iterate(distinct_replies=1 / 8) == ["collapse"]  # all eight are the same, though 1/8 is above 0.1


def test_another_distribution_is_sampled_from(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    assert run.iterate(sampling_residual=0.19) == []
    assert run.iterate(2, sampling_residual=0.21) == ["sampling"]
    (record,) = caplog.records
    assert "another distribution than the policy's: sampling_residual is 0.21; set --model.ro" in record.message


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


# ---- reward hacking --------------------------------------------------------------------------------------------------


def history(**series: Sequence[float]) -> list[dict[str, float]]:
    """The metrics of each validation from one list per metric."""
    return [dict(zip(series, values, strict=True)) for values in zip(*series.values(), strict=True)]


@pytest.mark.parametrize(
    ("series", "clause"),
    [
        # A factor that counts "the": the run of the issue that asked for this alarm.
        (
            {"reward": [0.25, 0.6, 0.99], "answer_accuracy": [0.25, 0.2, 0.05], "perplexity": [2.2, 3.0, 6.3]},
            "the answer accuracy has fallen from 0.25 to 0.05",
        ),
        (
            {"reward": [0.25, 0.99], "perplexity": [2.2, 6.3]},
            "the perplexity on conversations has grown from 2.2 to 6.3",
        ),
        # The total rises by 0.6, of which the count of "the" earns 1.0 and politeness loses 0.4.
        (
            {"reward": [0.5, 1.1], "reward_the": [0.0, 1.0], "reward_polite": [0.5, 0.1]},
            "the factor polite has fallen from 0.5 to 0.1",
        ),
        # Accuracy was best in the second validation, and the reward has risen since then.
        ({"reward": [0.0, 0.5, 0.8], "answer_accuracy": [0.3, 0.6, 0.45]}, "the answer accuracy has fallen from 0.60"),
    ],
)
def test_reward_hacking_is_found(series: dict[str, list[float]], clause: str) -> None:
    found = reward_hacking(history(**series))
    assert found is not None
    assert found.startswith(clause)


@pytest.mark.parametrize(
    "series",
    [
        {"reward": [0.5]},
        {"reward": [0.5, 0.9]},
        # The demo, seed 0.
        {
            "reward": [0.95, 1.19, 1.23, 1.25],
            "answer_accuracy": [0.752, 0.845, 0.871, 0.898],
            "perplexity": [1.98, 2.22, 2.34, 2.34],
            "reward_learned_quality": [0.95, 1.2, 1.24, 1.25],
            "reward_missing_end": [0.0, -0.01, -0.01, 0.0],
        },
        {"reward": [0.5, 0.9], "answer_accuracy": [0.50, 0.45]},  # within the noise of a hundred prompts
        {"reward": [0.9, 0.2], "answer_accuracy": [0.5, 0.1], "perplexity": [2.0, 9.0]},  # the reward falls as well
    ],
)
def test_a_healthy_history_is_no_reward_hacking(series: dict[str, list[float]]) -> None:
    assert reward_hacking(history(**series)) is None


def test_reward_hacking_must_last_for_two_validations(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    for reward, accuracy in ((0.25, 0.25), (0.6, 0.1)):
        run.iterate(2, reward=reward)
        run.trainer.callback_metrics["val/answer_accuracy"] = torch.tensor(accuracy)
        assert run.validate(reward) == []
    run.iterate(2, reward=0.9)
    run.trainer.callback_metrics["val/answer_accuracy"] = torch.tensor(0.05)
    assert run.validate(0.9) == ["held-out hacking"]
    assert "the reward on validation prompts rises, but the answer accuracy has fallen from 0.25 to 0.05" in caplog.text


class CountThe(ReplyFactor):
    """How often the response contains the letters t, h, e next to each other; at most 1."""

    def score(self, prompt: Conversation, reply: Reply) -> float:
        return min(1.0, reply.text.count("the") / 4)


@pytest.mark.slow
def test_over_optimizing_a_count_of_the_raises_the_alarm(caplog: pytest.LogCaptureFixture) -> None:
    """A real run: the policy learns to say "the" only, and its perplexity on human conversations grows."""
    module = ppo("rlchat_1k", reward=Reward([CountThe()]), kl_coef=0.0, ppo_epochs=4, minibatches=1)
    questions = prompts(module.tokenizer, QUESTIONS * 8)
    alarms = Alarms(patience=1000)
    held_out = [serve([prompts(module.tokenizer)]), serve([sequences(module.tokenizer)])]
    run = trainer(callbacks=[alarms], val_check_interval=8)
    run.fit(module, serve([questions] * 80), held_out)
    assert float(run.callback_metrics["val/reward"]) > 0.5
    assert "held-out hacking" in alarms.raised


# ---- the rest --------------------------------------------------------------------------------------------------------


def test_a_resumed_run_does_not_warn_twice(run: Run, encoding: str) -> None:
    run.iterate(3, kl=60.0)
    run.iterate(2, truncated_fraction=0.9)
    resumed = Run(encoding)
    resumed.alarms.load_state_dict(run.alarms.state_dict())
    assert resumed.iterate(1, truncated_fraction=0.9, kl=60.0) == ["kl", "truncated"]
    assert run.alarms.raised == ["kl"]  # the state is a copy


@pytest.mark.slow
def test_a_real_run_without_kl_penalty(encoding: str, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """Without a KL penalty the policy leaves its reference model; no response of eight bytes is ever too long."""
    module = ppo(encoding, reward=Reward([Letters(), TooLong()]), kl_coef=0.0)
    alarms = Alarms(patience=5, kl_bound=0.2)
    fit(module, 12, callbacks=[alarms], logger=CSVLogger(tmp_path, name="ppo", version="0"))
    assert {"kl", "reward/too_long"} <= set(alarms.raised)
    recorded = [json.loads(line) for line in (tmp_path / "ppo" / "0" / "alarms.jsonl").read_text().splitlines()]
    assert [row["what"] for row in recorded] == alarms.raised
    assert all(1 <= row["iteration"] <= 12 and row["message"] in caplog.text for row in recorded)
    assert "reward/letters" not in alarms.raised
    assert sum(record.name == "rlchat" for record in caplog.records) == len(alarms.raised)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("kl_bound", 0.0, "a positive number"),
        ("min_distinct", 2.0, "a fraction from 0 to 1"),
        ("max_truncated", -0.1, "a fraction from 0 to 1"),
        ("patience", 0, "a positive integer"),
        ("checks", "loose", "warn or strict"),
    ],
)
def test_invalid_options_are_errors(name: str, value: float | str, expected: str) -> None:
    options: dict[str, Any] = {name: value}
    with pytest.raises(UserError, match=rf"^invalid value '?{value}'? for Alarms\.{name}: expected {expected}$"):
        Alarms(**options)
