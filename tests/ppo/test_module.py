"""The PPO loop on a tiny model: the first ratio is 1, rewards rise, padding has no effect, and runs resume exactly."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.small_ppo import (
    BACKBONES,
    ONE_STEP,
    QUESTIONS,
    LetterE,
    Log,
    alone,
    fit,
    iterated,
    ppo,
    prompts,
    rolled_out,
    sequences,
    serve,
    trainer,
)
from torch import Tensor

from rlchat.callbacks.predictions import Predictions
from rlchat.conversation import Check, Conversation, Message
from rlchat.data.datamodule import PromptBatch
from rlchat.errors import UserError
from rlchat.models.model_file import load_policy
from rlchat.models.sampling import Generated
from rlchat.ppo.module import Iteration, PPOModule
from rlchat.rewards import MissingEnd, Reply, ReplyFactor, Reward


class Remembers(ReplyFactor):
    """Gives fixed scores and keeps its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, Reply]] = []

    def score(self, prompt: Conversation, reply: Reply) -> float:
        self.seen.append((prompt.messages[-1].text, reply))
        return float(len(self.seen))


# ---- rollouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", BACKBONES)
def test_the_first_ratio_is_1_and_the_first_kl_0(encoding: str, family: str) -> None:
    module = ppo(encoding, family, ppo_epochs=1, minibatches=3)
    rows = fit(module, 3)
    for row in rows:
        assert row["train/ratio_residual"] <= 1e-5
    assert abs(rows[0]["train/kl"]) <= 1e-5
    assert rows[0]["train/approx_kl"] > 1e-7  # later minibatches differ from the old policy
    assert abs(rows[-1]["train/kl"]) > 1e-3


@pytest.mark.parametrize("family", BACKBONES)
@torch.no_grad()
def test_a_rollout_equals_the_rollouts_of_its_prompts_alone(encoding: str, family: str) -> None:
    """Log-probs, values and text of left-padded rows, compared with a plain forward pass over each row."""
    module = ppo(encoding, family, temperature=0.8)
    torch.nn.init.normal_(module.model.value_head.weight)  # type: ignore[arg-type]
    rollout = rolled_out(module)
    for row, conversation in enumerate(rollout.conversations):
        prompt = module.tokenizer.render_prompt(conversation).ids
        length = int(rollout.response_mask[row].sum())
        said = rollout.ids[row][rollout.sampled[row]]
        whole = torch.tensor([[*prompt, *said.tolist()]])
        hidden = module.model.eval()(whole, torch.ones_like(whole, dtype=torch.bool))[0, len(prompt) - 1 : -1]
        logprobs = (module.model.logits(hidden) / 0.8).log_softmax(-1)[torch.arange(length), said]
        torch.testing.assert_close(rollout.old_logprobs[row, :length], logprobs, atol=1e-5, rtol=0)
        values = module.model.value_head(hidden).squeeze(-1)
        torch.testing.assert_close(rollout.values[row, :length], values, atol=1e-5, rtol=0)
        for tensor in (rollout.old_logprobs, rollout.ref_logprobs, rollout.values):
            assert (tensor[row, length:] == 0).all()
        ended = bool(said[-1] == module.tokenizer.end_id)
        assert rollout.replies[row] == Reply(module.tokenizer.decode(said.tolist()).strip(), length, ended)
        assert ended or length == 8


def test_the_reward_scores_the_generated_responses(encoding: str) -> None:
    factor = Remembers()
    module = ppo(encoding, reward=Reward([factor]))
    expected = rolled_out(ppo(encoding))
    rows = fit(module, 1)
    assert factor.seen == list(zip(QUESTIONS, expected.replies, strict=True))
    assert rows[0]["train/reward"] == rows[0]["reward/remembers"] == pytest.approx(4.5)  # of 1 to 8
    lengths = [reply.tokens for reply in expected.replies]
    assert rows[0]["train/response_length"] == pytest.approx(sum(lengths) / 8)
    truncated = sum(not reply.ended for reply in expected.replies)
    assert rows[0]["train/truncated_fraction"] == pytest.approx(truncated / 8)


@torch.no_grad()
def test_targets_by_hand(encoding: str) -> None:
    """Values of 0, γ = λ = 1 and no KL: every return is the score, and whitened advantages are ± 1."""
    module = alone(ppo(encoding, lam=1.0, kl_coef=0.0))
    tokens = torch.tensor([[97, 98, 260], [99, 260, 256]])
    said = Generated(tokens, tokens != 256, torch.tensor([True, True]), torch.zeros(2, 3))
    module.generate = lambda *_: said  # type: ignore[method-assign]
    rollout = rolled_out(module, prompts(module.tokenizer, QUESTIONS[:2]))
    assert [reply.text for reply in rollout.replies] == ["ab", "c"]
    targets = module.compute_advantages(rollout, module.token_rewards(rollout, torch.tensor([1.0, -4.0])))
    assert targets.returns.tolist() == [[1, 1, 1], [-4, -4, 0]]
    mean = (3 * 1 - 2 * 4) / 5  # -1
    deviation = ((3 * 2**2 + 2 * 3**2) / 5) ** 0.5  # √6
    expected = torch.tensor([[1.0, 1.0, 1.0], [-4.0, -4.0, mean]]).sub(mean) / deviation
    torch.testing.assert_close(targets.advantages, expected)
    # With all values 0.5, advantages are score - 0.5 and returns are unchanged.
    half = replace(rollout, values=said.mask * 0.5)
    targets = module.compute_advantages(half, module.token_rewards(half, torch.ones(2)))
    torch.testing.assert_close(targets.returns, said.mask.float())


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@torch.no_grad()
def test_rewards_are_the_kl_penalty_per_token_and_the_score_on_the_last(encoding: str, kind: str) -> None:
    """With λ = 0 and values of 0, the returns are the per-token rewards."""
    module = ppo(encoding, lam=0.0, kl_coef=0.3, kl_kind=kind)
    for parameter in module.reference.parameters():
        parameter.mul_(1.5)
    rollout, scores = rolled_out(module), torch.arange(8.0)
    d = rollout.old_logprobs - rollout.ref_logprobs
    assert d.abs().max() > 0.01
    expected = {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d}[kind] * -0.3
    lengths = rollout.response_mask.sum(1)
    expected[torch.arange(8), lengths - 1] += scores
    expected[~rollout.response_mask] = 0
    torch.testing.assert_close(
        module.compute_advantages(rollout, module.token_rewards(rollout, scores)).returns, expected
    )
    whitening = alone(ppo(encoding, lam=0.0, kl_coef=0.3, kl_kind=kind, whiten_rewards=True))
    inside = expected[rollout.response_mask]
    scaled = (inside - inside.mean()) / inside.std(correction=0) + inside.mean()
    torch.testing.assert_close(
        whitening.compute_advantages(rollout, whitening.token_rewards(rollout, scores)).returns[rollout.response_mask],
        scaled,
    )


def test_the_loss_is_the_sum_of_its_parts(encoding: str) -> None:
    def loss(**options: Any) -> tuple[float, dict[str, Tensor]]:
        module = ppo(encoding, **options)
        rollout = rolled_out(module)
        iteration = iterated(module, rollout, torch.arange(8.0))
        total, stats = module.minibatch_loss(iteration, torch.arange(8), rollout.response_mask.sum())
        return total.item(), stats

    total, stats = loss(value_coef=0.25, entropy_coef=0.125)
    policy, value, entropy = (float(stats[name]) for name in ("policy_loss", "value_loss", "entropy"))
    assert min(value, entropy) > 0.1
    assert total == pytest.approx(policy + 0.25 * value - 0.125 * entropy)
    assert loss(value_coef=0.0, entropy_coef=0.0)[0] == pytest.approx(policy, abs=1e-6)


@torch.no_grad()
def test_a_minibatch_loss_is_the_mean_over_its_tokens(encoding: str) -> None:
    """Responses of 3 and 2 tokens, at ratio 1: the policy loss is minus the mean advantage of the minibatch.

    If they were divided by the tokens of the whole rollout, the first would be -6/5 and the second -9/5.
    """
    module = alone(ppo(encoding))
    tokens = torch.tensor([[97, 98, 260], [99, 260, 256]])
    said = Generated(tokens, tokens != 256, torch.tensor([True, True]), torch.zeros(2, 3))
    module.generate = lambda *_: said  # type: ignore[method-assign]
    rollout = rolled_out(module, prompts(module.tokenizer, QUESTIONS[:2]))
    advantages = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 0.0]])
    iteration = Iteration(rollout, {}, torch.zeros(2), torch.zeros(2, 3), advantages, torch.zeros(2, 3))
    for rows, expected in (([0], -2.0), ([1], -4.5), ([0, 1], -3.0)):
        for minibatch in ([torch.tensor(rows)], [*torch.tensor(rows).split(1)]):  # in one microbatch, or one row each
            losses = [compute() for compute in module.minibatch_losses(iteration, minibatch, None)]
            found = sum(float(metrics["policy_loss"]) for _, metrics in losses)
            assert found == pytest.approx(expected, abs=1e-4)


def wider(x: Tensor, left: int, right: int, value: float = 0) -> Tensor:
    return torch.nn.functional.pad(x, (left, right), value=value)


@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 4), (2, 5)])
def test_padding_does_not_change_the_update(encoding: str, left: int, right: int) -> None:
    """Neither padding of prompts and responses, nor padding of the rollout in the update."""
    module = alone(ppo(encoding, "distilbert", entropy_coef=0.1))
    torch.nn.init.normal_(module.model.value_head.weight, std=0.1)  # type: ignore[arg-type]
    batch, pad_id = prompts(module.tokenizer), module.tokenizer.pad_id
    padded_batch = PromptBatch(
        wider(batch.ids, left, 0, pad_id), wider(batch.attention_mask, left, 0), batch.conversations
    )
    plain, recalled = rolled_out(module, batch), rolled_out(module, padded_batch)
    assert plain.replies == recalled.replies
    sides = {"ids": pad_id, "attention_mask": 0, "sampled": 0}
    changes: dict[str, Any] = {name: wider(getattr(plain, name), left, right, value) for name, value in sides.items()}
    for name in ("response_mask", "old_logprobs", "ref_logprobs", "values"):
        changes[name] = wider(getattr(plain, name), left, right)
    changes["response_index"] = wider(plain.response_index, left, right, -1)
    around = replace(plain, **changes)
    scores, results = torch.randn(8, generator=torch.Generator().manual_seed(0)), []
    for rollout in (plain, recalled, around):
        iteration = iterated(module, rollout, scores)
        module.zero_grad()
        rows = torch.tensor([6, 1, 3])
        loss, stats = module.minibatch_loss(iteration, rows, rollout.response_mask[rows].sum())
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in module.model.parameters() if p.grad is not None])
        results.append([loss.detach(), gradient, *stats.values(), iteration.returns.sum(), rollout.kl])
    for expected, *others in zip(*results, strict=True):
        for other in others:
            torch.testing.assert_close(other, expected, atol=1e-5, rtol=1e-4)


# ---- learning --------------------------------------------------------------------------------------------------------


def test_ppo_learns_a_rule(encoding: str) -> None:
    module = ppo(encoding, reward=Reward([LetterE()]), kl_coef=0.0, ppo_epochs=2, minibatches=2)
    rows = fit(module, 25, prompts(module.tokenizer, QUESTIONS * 4))
    first, last = (sum(row["train/reward"] for row in part) / 5 for part in (rows[:5], rows[-5:]))
    assert first < 0.1
    assert last > first + 0.3
    assert rows[-1]["train/kl"] > 1  # it has moved away from the reference
    assert rows[-1]["train/entropy"] < rows[0]["train/entropy"]
    assert all(row["train/episodes"] == 32 * (i + 1) for i, row in enumerate(rows))
    assert (module.iterations, module.episodes) == (25, 800)
    # The reference has not changed: it equals that of a new module with the same seed.
    for one, other in zip(module.reference.parameters(), ppo(encoding).model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_reinforce_pp_learns_a_rule_from_one_response_per_prompt(encoding: str) -> None:
    module = ppo(
        encoding, reward=Reward([LetterE()]), kl_coef=0.0, ppo_epochs=2, minibatches=2, advantage="reinforce_pp"
    )
    rows = fit(module, 25, prompts(module.tokenizer, QUESTIONS * 4))
    first, last = (sum(row["train/reward"] for row in part) / 5 for part in (rows[:5], rows[-5:]))
    assert first < 0.1
    assert last > first + 0.3
    assert "train/value_loss" not in rows[0]
    assert module.options.group_size == 1


def test_the_critic_has_its_own_lambda(encoding: str) -> None:
    """With 1, the targets of the critic are the rewards to go, whatever it predicts; the advantages do not change."""
    plain, decoupled = (ppo(encoding, lam_critic=lam, kl_coef=0.0) for lam in (None, 1.0))
    rollout, scores = rolled_out(plain), torch.arange(8.0)
    one, two = iterated(plain, rollout, scores), iterated(alone(decoupled), rollout, scores)
    assert torch.equal(one.advantages, two.advantages)
    torch.testing.assert_close(two.returns, scores[:, None] * rollout.response_mask)
    assert not torch.allclose(one.returns, two.returns)


@pytest.mark.slow
def test_the_kl_penalty_keeps_the_policy_close_to_the_reference(encoding: str) -> None:
    free, held = (fit(ppo(encoding, kl_coef=coef, minibatches=2), 6)[-1]["train/kl"] for coef in (0.0, 5.0))
    assert held < free / 2


def test_target_kl_stops_training_on_a_rollout(encoding: str) -> None:
    options: dict[str, Any] = {"ppo_epochs": 3, "minibatches": 2}
    assert fit(ppo(encoding, **options), 1)[0]["train/optimizer_steps"] == 6
    assert fit(ppo(encoding, **options, target_kl=1e9), 1)[0]["train/optimizer_steps"] == 6
    assert fit(ppo(encoding, **options, target_kl=1e-9), 1)[0]["train/optimizer_steps"] == 2  # the pass is finished


def test_mixed_in_conversations_add_their_loss(encoding: str) -> None:
    module = ppo(encoding, sft_coef=2.0, learning_rate=0.0, **ONE_STEP)
    batch = sequences(module.tokenizer)
    with torch.no_grad():  # by hand: the mean over all tokens of the assistant, including end markers
        logprobs = module.model.eval().logits(module.model(batch.ids, batch.attention_mask)).log_softmax(-1)
    said = [
        -float(logprobs[row, place - 1, batch.ids[row, place]]) for row, place in batch.loss_mask.nonzero().tolist()
    ]
    assert len(said) == 7 + 10 + 2
    module.model.train()
    rows = fit(module, 1)
    assert rows[0]["train/sft_loss"] == pytest.approx(sum(said) / len(said), abs=1e-5)
    assert "train/sft_loss" not in fit(ppo(encoding, **ONE_STEP), 1)[0]
    assert ppo(encoding, sft_coef=0.0).data_needs.mix_sequences is False
    # Training makes the human responses more likely.
    rows = fit(ppo(encoding, sft_coef=2.0, ppo_epochs=2, minibatches=2), 6)
    assert rows[-1]["train/sft_loss"] < rows[0]["train/sft_loss"] - 0.3


def test_the_adaptive_coefficient_adapts_to_the_kl(encoding: str) -> None:
    module = ppo(encoding, kl_coef=0.1, kl_target=1e-3, kl_horizon=80)
    rows = fit(module, 3)
    coefficients = [row["train/kl_coef"] for row in rows]
    assert coefficients[0] == pytest.approx(0.1)
    assert coefficients[1] == pytest.approx(0.1 * (1 - 0.2 * 8 / 80))  # no KL yet: the largest possible decrease
    expected = coefficients[1] * (1 + (0.2 if rows[1]["train/kl"] > 0 else -0.2) * 8 / 80)
    assert coefficients[2] == pytest.approx(expected)
    assert module.kl_coef == module.adaptive_kl.coef  # type: ignore[union-attr]


def test_the_adaptive_coefficient_stays_positive_and_fixed_during_critic_warmup(encoding: str) -> None:
    """For any number of episodes per iteration; in the warm-up, the KL carries no information."""
    rows = fit(ppo(encoding, kl_coef=0.1, kl_target=1e3, kl_horizon=1, **ONE_STEP), 3)
    assert [row["train/kl_coef"] for row in rows] == pytest.approx([0.1, 0.08, 0.064])
    rows = fit(ppo(encoding, kl_coef=0.1, kl_target=1e3, kl_horizon=1, critic_warmup=2, **ONE_STEP), 4)
    assert [row["train/kl_coef"] for row in rows] == pytest.approx([0.1, 0.1, 0.1, 0.08])


@pytest.mark.slow
def test_the_kl_in_the_loss_keeps_the_policy_close_to_the_reference(
    encoding: str, caplog: pytest.LogCaptureFixture
) -> None:
    """By default with k3; k1 has no gradient on average, and there is a warning."""
    assert ppo(encoding).options.kl_estimator == "k1"
    options: dict[str, Any] = {"ppo_epochs": 2, "minibatches": 1, "kl_in": "loss", "learning_rate": 3e-3}
    held, free = (ppo(encoding, kl_coef=coef, adam_beta2=0.95, **options) for coef in (5.0, 0.0))
    assert held.options.kl_estimator == "k3"
    held_kl, free_kl = (sum(row["train/kl"] for row in fit(module, 25)[-5:]) / 5 for module in (held, free))
    assert held_kl < free_kl / 2
    assert not [record for record in caplog.records if record.name == "rlchat"]
    ppo(encoding, kl_in="loss", kl_kind="k1")
    assert "a gradient of 0 on average" in caplog.text


def test_during_warmup_only_the_critics_gradient_is_clipped(encoding: str) -> None:
    """The SFT loss only has gradients in the policy, which is frozen in the warm-up."""
    norms = []
    for sft_coef in (0.0, 50.0):
        module = ppo(encoding, critic_warmup=1, sft_coef=sft_coef, max_grad_norm=0.1)
        norms.append(fit(module, 1)[0]["train/grad_norm"])
    assert norms[0] == pytest.approx(norms[1])


def test_the_learning_rate_decays_over_the_iterations(encoding: str) -> None:
    rows = fit(ppo(encoding, schedule="linear", learning_rate=1e-3, **ONE_STEP), 4)
    assert [row["train/learning_rate"] for row in rows] == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


def test_gradients_are_clipped(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ppo(encoding, max_grad_norm=1e-3)
    norms: list[float] = []  # that the optimizer got

    def after_step() -> None:
        gradients = [p.grad for p in module.model.parameters() if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    monkeypatch.setattr(module, "count_skipped_steps", after_step)
    (row,) = fit(module, 1)
    assert row["train/grad_norm"] > 2e-3  # what it was
    assert norms == pytest.approx([1e-3] * len(norms), rel=1e-2)
    assert norms


# ---- steps without a finite gradient ---------------------------------------------------------------------------------


def breaks(module: PPOModule, steps: Iterable[int], kind: str) -> None:
    """The loss, or the gradient of a single weight, is NaN in the given steps, counted from 0."""
    plain, count = module.minibatch_loss, iter(range(10**6))

    def broken(*args: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, stats = plain(*args)
        if next(count) in steps:
            if kind == "loss":
                return loss * torch.nan, {**stats, "policy_loss": stats["policy_loss"] * torch.nan}
            weight = next(module.model.backbone.parameters())
            loss = loss + (weight.flatten()[0] - weight.detach().flatten()[0]).abs().sqrt()  # 0, with infinite slope
        return loss, stats

    module.minibatch_loss = broken  # type: ignore[method-assign]


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_counted_and_named(
    encoding: str, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    module = ppo(encoding, ppo_epochs=1, minibatches=2)
    breaks(module, {1, 2}, kind)
    rows = fit(module, 3)
    assert all(p.isfinite().all() for p in module.parameters())
    assert [row["train/skipped_steps"] for row in rows] == [1, 2, 2]
    assert [row["train/optimizer_steps"] for row in rows] == [1, 1, 2]
    assert rows[0]["train/policy_loss"] == rows[0]["train/policy_loss"]  # the mean over the steps that were not skipped
    name = "policy_loss" if kind == "loss" else "the gradient of model.backbone.transformer."
    warnings = [record.message for record in caplog.records if record.name == "rlchat"]
    assert [warning.partition(": ")[0] for warning in warnings] == ["iteration 1", "iteration 2"]
    assert all(name in warning for warning in warnings)


def test_a_skipped_step_does_not_change_the_optimizer(encoding: str) -> None:
    """One step and one skipped step equal one step, for the weights and for AdamW's state."""
    states = []
    for skipped in ({1}, set()):
        module = ppo(encoding, ppo_epochs=1, minibatches=2 if skipped else 1)
        rollout = rolled_out(module)
        module.train()
        module.minibatches = lambda rows, epoch: [[torch.arange(8)]] * (2 if skipped else 1)  # type: ignore[method-assign]  # noqa: B023
        breaks(module, skipped, "loss")
        run = trainer()
        run.fit(module, serve([prompts(module.tokenizer)]))
        moments = [s["exp_avg"] for s in run.optimizers[0].state_dict()["state"].values()]
        states.append([*moments, *(p.detach() for p in module.model.parameters())])
        assert len(rollout.replies) == 8
    for one, other in zip(*states, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)


def test_three_consecutive_skipped_steps_stop_the_run(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module = ppo(encoding, ppo_epochs=2, minibatches=2)
    before = [p.detach().clone() for p in module.model.parameters()]
    breaks(module, {0, 1, 2, 3}, "loss")
    says = "iteration 1: policy_loss was not finite in 3 optimizer steps in a row; .* in .*not_finite_0.jsonl"
    with pytest.raises(UserError, match=says):
        fit(module, 3, default_root_dir=str(tmp_path))
    assert all(torch.equal(one, other) for one, other in zip(before, module.model.parameters(), strict=True))
    (saved,) = tmp_path.rglob("last_good.pt")
    state = load_policy(saved).model.state_dict()
    assert all(torch.equal(state[name], p) for name, p in module.model.state_dict().items())
    (dump,) = tmp_path.rglob("not_finite_0.jsonl")
    rows = [json.loads(line) for line in dump.read_text().splitlines()]
    assert [row["prompt"][0]["content"] for row in rows] == list(QUESTIONS)
    assert {"reply", "reward", "factors", "kl", "value", "ended_by"} <= set(rows[0])


@pytest.mark.parametrize(("passes", "says"), [(4, "was not finite in 3 optimizer steps"), (1, "logits are not finite")])
def test_the_last_good_weights_are_those_before_the_destructive_step(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: int, says: str
) -> None:
    """The second iteration's learning rate of 1e30 corrupts the weights, which shows in the next losses."""
    monkeypatch.chdir(tmp_path)
    module = ppo(encoding, ppo_epochs=passes, minibatches=1)
    good: list[Tensor] = []

    class Destroy(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            if module.iterations == 1:
                good.extend(p.detach().clone() for p in module.model.parameters())
                for group in trainer.optimizers[0].param_groups:
                    group["lr"] = 1e30

    with pytest.raises(UserError, match=f"{says}.* the last good weights (are )?in .*; lower --model.learning_rate"):
        fit(module, 4, callbacks=[Destroy()], default_root_dir=str(tmp_path))
    assert module.iterations == (1 if passes > 1 else 2)
    (saved,) = tmp_path.rglob("last_good.pt")
    found = load_policy(saved).model.parameters()
    assert all(torch.equal(one, other) for one, other in zip(good, found, strict=True))


def test_skipped_steps_that_are_not_consecutive_do_not_stop_the_run(encoding: str) -> None:
    module = ppo(encoding, ppo_epochs=3, minibatches=2)
    breaks(module, {0, 1, 3, 4}, "loss")
    assert fit(module, 1)[0]["train/skipped_steps"] == 4


# ---- the trainer -----------------------------------------------------------------------------------------------------


def test_a_trainer_with_max_steps_is_an_error(encoding: str) -> None:
    module = ppo(encoding)
    with pytest.raises(UserError, match=r"trainer\.max_steps is not supported by PPO"):
        fit(module, 3, max_steps=5)
    assert module.iterations == 0


def test_fast_dev_run_counts_iterations(encoding: str) -> None:
    module = ppo(encoding, ppo_epochs=2, minibatches=2)
    fit(module, 4, fast_dev_run=2)
    assert module.iterations == 2


# ---- minibatches and processes ---------------------------------------------------------------------------------------


def test_minibatches_are_shuffled_again_in_each_pass(encoding: str) -> None:
    module = alone(ppo(encoding, minibatches=3))
    passes = []
    for epoch in range(2):
        parts = [torch.cat(minibatch) for minibatch in module.minibatches(8, epoch)]
        assert sorted(len(part) for part in parts) == [2, 3, 3]
        assert sorted(torch.cat(parts).tolist()) == list(range(8))
        passes.append(torch.cat(parts).tolist())
    assert passes[0] != passes[1]

    def all_rows(count: int) -> list[Tensor]:
        return [rows for minibatch in module.minibatches(count, 0) for rows in minibatch]

    assert passes[0] == torch.cat(all_rows(8)).tolist()
    module.iterations = 1
    assert passes[0] != torch.cat(all_rows(8)).tolist()
    assert [len(rows) for rows in all_rows(2)] == [1, 1]  # no empty minibatch


def test_two_processes_take_the_same_minibatches_as_one(encoding: str) -> None:
    """Row i of process r is global row 2·i + r."""
    one = alone(ppo(encoding, minibatches=3)).minibatches(8, 0)
    two = [alone(ppo(encoding, minibatches=3), 2, rank).minibatches(4, 0) for rank in range(2)]
    for whole, even, odd in zip(one, *two, strict=True):
        rows = [*(2 * torch.cat(even)).tolist(), *(2 * torch.cat(odd) + 1).tolist()]
        assert sorted(torch.cat(whole).tolist()) == sorted(rows)
    rows = [alone(ppo(encoding), 2, rank).global_rows(4, first=4).tolist() for rank in range(2)]
    assert rows == [[8, 10, 12, 14], [9, 11, 13, 15]]


def test_the_average_gradient_of_processes_equals_that_of_one(encoding: str) -> None:
    """Also if one of them has no row of the minibatch."""
    module = ppo(encoding, entropy_coef=0.05)
    rollout = rolled_out(module)
    iteration = iterated(module, rollout, torch.arange(8.0))
    minibatch = torch.tensor([1, 3, 7, 5, 2])

    def gradient(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        module.zero_grad()
        tokens = rollout.response_mask[minibatch].sum() / len(parts)
        losses = []
        for rank, part in enumerate(parts):
            loss, _ = alone(module, len(parts), rank).minibatch_loss(iteration, part, tokens)
            (loss / len(parts)).backward()
            losses.append(loss.detach())
        grads = torch.cat([p.grad.flatten() for p in module.model.parameters() if p.grad is not None])
        return torch.stack(losses).mean(), grads

    whole = gradient([minibatch])
    for parts in ([minibatch[:2], minibatch[2:]], [minibatch, minibatch[:0]], [*minibatch.split(1)]):
        for one, other in zip(gradient(parts), whole, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


# ---- logs, checkpoints and errors ------------------------------------------------------------------------------------


def test_the_names_of_the_metrics(encoding: str) -> None:
    reward = Reward([LetterE(weight=0.5), MissingEnd(weight=0.25)])
    (row,) = fit(ppo(encoding, reward=reward), 1)
    names = (
        "policy_loss value_loss entropy reward kl approx_kl clip_fraction value_clip_fraction explained_variance "
        "ratio_residual response_length truncated_fraction grad_norm learning_rate kl_coef"
    )
    expected = {f"train/{name}" for name in names.split()} | {
        "reward/letter_e",
        "reward/missing_end",
        "time/rollout_s",
        "time/score_s",
        "time/update_s",
        "perf/tokens_per_s",
    }
    assert expected <= set(row)
    assert row["train/reward"] == pytest.approx(row["reward/letter_e"] + row["reward/missing_end"])
    assert all(value == value for value in row.values())
    assert row["perf/tokens_per_s"] > 0


def test_held_out_metrics(encoding: str) -> None:
    factor = LetterE()
    module = ppo(encoding, reward=Reward([factor, MissingEnd(0.25)]))
    loaders = [serve([prompts(module.tokenizer, QUESTIONS[:5]), prompts(module.tokenizer, QUESTIONS[5:])])]
    loaders.append(serve([sequences(module.tokenizer)]))
    (first, *_), (second, *_) = (trainer().validate(module, loaders, verbose=False) for _ in range(2))
    assert first == second  # the same random numbers each time
    replies = [row["reply"] for row in module.held_out_rows]
    assert len(replies) == 8
    assert first["val/reward_letter_e"] == pytest.approx(
        sum(factor.score(Conversation(()), Reply(r, 0, True)) for r in replies) / 8
    )
    assert first["val/reward"] == pytest.approx(first["val/reward_letter_e"] + first["val/reward_missing_end"])
    assert first["val/reward_missing_end"] == pytest.approx(-0.25 * first["val/truncated_fraction"])
    assert abs(first["val/kl"]) < 1e-5
    assert first["val/perplexity"] == pytest.approx(257, rel=0.5)  # untrained: about the number of possible tokens
    assert {"val/accuracy", "val/response_length", "val/distinct_2"} <= set(first)
    # Only the order of the prompts matters, not the batches.
    together = trainer().validate(module, [serve([prompts(module.tokenizer)]), loaders[1]], verbose=False)[0]
    assert together == pytest.approx(first)
    tested = trainer().test(module, loaders, verbose=False)[0]
    assert tested["test/reward"] == first["val/reward"]


def test_correct_answers_are_counted(encoding: str) -> None:
    module = ppo(encoding)
    batch = prompts(module.tokenizer)
    module.generate = lambda ids, *_: Generated(  # type: ignore[method-assign]
        torch.tensor([[ord("a"), 260], [ord("b"), 260], [ord("a"), 260]]),
        torch.ones(3, 2, dtype=torch.bool),
        torch.ones(3, dtype=torch.bool),
        torch.zeros(3, 2),
    )
    asked = tuple(
        Conversation((Message("user", text),), check=check)
        for text, check in zip("xyz", (Check(("a",)), Check(("a",)), None), strict=True)
    )
    batch = PromptBatch(batch.ids[:3], batch.attention_mask[:3], asked)
    found = trainer().validate(module, [serve([batch])], verbose=False)[0]
    assert found["val/answer_accuracy"] == 0.5  # of the two that can be checked
    assert found["val/answer_accuracy_greedy"] == 0.5


def test_pass_at_k_from_several_responses_to_each_prompt(encoding: str) -> None:
    module = ppo(encoding)
    letters = {4: "abcd", 2: "ab"}  # two responses to each prompt, and one that is greedy

    def generated(ids: torch.Tensor, *_: Any) -> Generated:
        rows = [[ord(letter), 260] for letter in letters[len(ids)]]
        return Generated(
            torch.tensor(rows),
            torch.ones(len(ids), 2, dtype=torch.bool),
            torch.ones(len(ids), dtype=torch.bool),
            torch.zeros(len(ids), 2),
        )

    module.generate = generated  # type: ignore[method-assign]
    batch = prompts(module.tokenizer)
    asked = tuple(Conversation((Message("user", text),), check=Check(("b",))) for text in "xy")
    batch = PromptBatch(batch.ids[:2], batch.attention_mask[:2], asked)
    found = trainer(callbacks=[Predictions(best_of=2)]).test(module, [serve([batch])], verbose=False)[0]
    assert (found["test/answer_accuracy"], found["test/answer_accuracy_greedy"]) == (0.25, 0.5)
    assert (found["test/pass@1"], found["test/pass@2"]) == (0.25, 0.5)  # b is the second response to the first prompt
    assert [row["reply"] for row in module.held_out_rows] == [*"abcd"]
    validated = trainer(callbacks=[Predictions(best_of=2)]).validate(module, [serve([batch])], verbose=False)[0]
    assert validated["val/pass@2"] == 0.5
    with pytest.raises(UserError, match="--best_of 2 compares responses to the same prompt; set --model"):
        trainer(callbacks=[Predictions(best_of=2)]).test(ppo(encoding, turns=2), [serve([batch])], verbose=False)


def test_training_validates_with_one_response_to_each_prompt(encoding: str) -> None:
    module = ppo(encoding, **ONE_STEP)
    batch = prompts(module.tokenizer)
    run = trainer(callbacks=[Predictions(best_of=3)])
    run.fit(module, serve([batch]), [serve([batch])])
    assert len(module.held_out_rows) == len(QUESTIONS)
    assert not any("pass@" in name for name in run.callback_metrics)


class SavesAfterTwo(L.Callback):
    """Writes ``path`` after the second training batch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if module.iterations == 2:
            trainer.save_checkpoint(self.path)
            self.state = copy.deepcopy({name: getattr(module, name) for name in ("episodes", "kl_coef")})


def test_a_resumed_run_equals_the_uninterrupted_one(encoding: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"kl_target": 1.0, "kl_horizon": 50, "kl_coef": 0.3, "schedule": "linear"}
    batches = [prompts(ppo(encoding).tokenizer, QUESTIONS[i : i + 4]) for i in range(4)]
    whole, saving = ppo(encoding, **options), SavesAfterTwo(tmp_path / "two.ckpt")
    trainer(callbacks=[saving]).fit(whole, serve(batches))

    resumed, seen = ppo(encoding, **options), []
    with torch.no_grad():  # the checkpoint counts, not the initial state of the new module
        for parameter in resumed.parameters():
            parameter.add_(1.0)

    class Starts(L.Callback):
        def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
            seen.append((module.iterations, module.episodes, module.kl_coef, module.adaptive_kl.coef))

    # A plain DataLoader restarts its epoch, so it gets the remaining batches.
    left = serve([*batches[2:], *batches[2:]])
    trainer(callbacks=[Starts()], limit_train_batches=4).fit(
        resumed, left, ckpt_path=str(tmp_path / "two.ckpt"), weights_only=True
    )
    kept = saving.state
    assert seen == [(2, kept["episodes"], kept["kl_coef"], kept["kl_coef"])]
    assert kept["kl_coef"] != 0.3
    assert (resumed.iterations, resumed.episodes) == (4, whole.episodes)
    assert resumed.kl_coef == whole.kl_coef
    for (name, one), other in zip(resumed.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_options_that_a_resumed_run_keeps_and_those_it_changes(
    encoding: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A fixed KL coefficient comes from the new options; the optimizer keeps its state, with a warning."""
    saving = SavesAfterTwo(tmp_path / "two.ckpt")
    batch = prompts(ppo(encoding).tokenizer)
    trainer(callbacks=[saving]).fit(ppo(encoding, kl_coef=0.1, **ONE_STEP), serve([batch] * 4))
    resumed = ppo(encoding, kl_coef=0.7, learning_rate=1e-4, **ONE_STEP)
    log = Log()
    trainer(callbacks=[log], limit_train_batches=4).fit(
        resumed, serve([batch] * 4), ckpt_path=str(tmp_path / "two.ckpt"), weights_only=True
    )
    assert log.rows[-1]["train/kl_coef"] == pytest.approx(0.7)
    assert log.rows[-1]["train/learning_rate"] == pytest.approx(1e-2)
    assert "the resumed run keeps learning_rate 0.01, not 0.0001; to change it, start a new run" in caplog.text


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_new_tokens": 48}, "invalid value 48 for max_new_tokens: it leaves no room"),
        ({"max_new_tokens": 0}, "invalid value 0 for max_new_tokens"),
        ({"temperature": 0.0}, "invalid value 0.0 for temperature"),
        ({"temperature": 1e-7}, "invalid value 1e-07 for temperature"),
        ({"kl_coef": -1.0}, "invalid value -1.0 for kl_coef: expected a non-negative number"),
        ({"gamma": 3.0}, "invalid value 3.0 for gamma: expected a number from 0 to 1"),
        ({"max_grad_norm": 0.0}, "invalid value 0.0 for max_grad_norm: expected a positive number"),
        ({"kl_target": 6.0, "kl_coef": 0.0}, "kl_coef 0 would stay 0"),
        ({"dual_clip": 1.0}, "invalid value 1.0 for dual_clip: expected a number above 1"),
        ({"turns": 0}, "invalid value 0 for turns: expected a positive integer"),
        ({"advantage": "reinforce"}, "invalid value 'reinforce' for advantage: expected one of gae, rloo, grpo"),
        ({"advantage": "rloo"}, "set --model.group_size to 2 or more"),
        ({"advantage": "grpo", "group_size": 2, "turns": 2}, "does not support turns"),
        ({"advantage": "grpo", "group_size": 2, "critic": "separate"}, "has no critic"),
        ({"lam_critic": 1.5}, "invalid value 1.5 for lam_critic: expected a number from 0 to 1"),
        ({"advantage": "reinforce_pp", "lam_critic": 1.0}, "has no critic; set --model.lam_critic null"),
        # Whitening adds a constant to each token, so the sum would depend on the length.
        ({"advantage": "rloo", "group_size": 2, "whiten_rewards": True}, "does not support whiten_rewards"),
    ],
    ids=str,
)
def test_invalid_options_are_errors(encoding: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        ppo(encoding, **options)


def test_training_works_at_a_temperature_below_1(encoding: str) -> None:
    (row,) = fit(ppo(encoding, temperature=0.5, entropy_coef=0.01), 1)
    assert row["train/ratio_residual"] <= 1e-5
    assert all(value == value for value in row.values())
