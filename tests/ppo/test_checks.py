"""The checks of PPO by hand: residuals of an iteration, gradients of the loss, and statistics of sampling."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlchat.ppo.advantages import gae, grpo, masked_whiten, rloo
from rlchat.ppo.checks.gradients import gradient_error, kl_gradient, policy_gradient, value_gradient
from rlchat.ppo.checks.residuals import (
    broken_prompts,
    broken_responses,
    fingerprint,
    group_residual,
    prompt_header,
    return_residual,
    reward_residual,
    shared_parameters,
    whitening_residual,
)
from rlchat.ppo.checks.sampler import Surprisal, repetition_evidence
from rlchat.ppo.losses import KLKind, kl_estimate, policy_loss, value_loss
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

# Two rows: responses 0 and 2 with a user turn between them, and response 1.
INDEX = torch.tensor([[0, 0, -1, 2], [1, 1, 1, -1]])
MASK = INDEX >= 0
SCORES = torch.tensor([4.0, -2.0, 1.0])
KL = torch.tensor([[0.5, -1.0, 9.0, 2.0], [0.0, 1.0, 3.0, 9.0]])
# -0.1 · KL, plus the score on the last token of each response
REWARDS = torch.tensor([[-0.05, 0.1 + 4, 0.0, -0.2 + 1], [0.0, -0.1, -0.3 - 2, 0.0]])


def alone(x: Tensor) -> Tensor:
    return x


# ---- rewards and advantages ------------------------------------------------------------------------------------------


def test_rewards_by_hand() -> None:
    assert reward_residual(REWARDS, SCORES, KL, INDEX, 0.1) == pytest.approx(0, abs=1e-6)
    assert reward_residual(torch.zeros(0, 3), torch.zeros(0), torch.zeros(0, 3), torch.zeros(0, 3).long(), 0.1) == 0


@pytest.mark.parametrize(
    ("row", "column", "change"),
    [(0, 1, 0.4), (0, 2, 0.4), (1, 3, -0.4), (1, 0, 0.4)],  # the score, a user turn, padding, a KL penalty
)
def test_a_wrong_reward_is_found_at_any_token(row: int, column: int, change: float) -> None:
    rewards = REWARDS.clone()
    rewards[row, column] += change
    assert reward_residual(rewards, SCORES, KL, INDEX, 0.1) == pytest.approx(0.4 / 4)  # relative to the score of 4


def test_the_sign_of_the_kl_and_the_order_of_the_scores_matter() -> None:
    assert reward_residual(REWARDS, SCORES, KL, INDEX, -0.1) == pytest.approx(0.2 * 3 / 4)
    assert reward_residual(REWARDS, SCORES[[0, 2, 1]], KL, INDEX, 0.1) == pytest.approx(3 / 4)


def test_returns_by_hand() -> None:
    """γ = 0.5, λ = 0.8 on one response: A₂ = 3 - 1 = 2, A₁ = 0 + 0.5·1 - 2 + 0.4·2 = -0.7; returns are A + V."""
    rewards, values = torch.tensor([[0.0, 3.0]]), torch.tensor([[2.0, 1.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    returns = torch.tensor([[1.3, 3.0]])
    assert return_residual(returns, values, rewards, mask, 0.5, 0.8) == pytest.approx(0, abs=1e-6)
    # A value of 1 after the end adds γ to the last return: its reward seems to be 3.5, and that before 0.2 less.
    across = torch.tensor([[1.5, 3.5]])
    assert return_residual(across, values, rewards, mask, 0.5, 0.8) == pytest.approx(0.5 / 3.5)
    # With the values exchanged, A = (0.3, 1), and the first reward seems to be 0.3 - 0.4·1 + 1 - 0.5·2 = -0.1.
    assert return_residual(returns, values.roll(1, 1), rewards, mask, 0.5, 0.8) == pytest.approx(0.1 / 3)


def test_returns_of_several_responses_in_a_row() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 4, generator=generator)
    _, returns = gae(REWARDS, values, MASK, 0.9, 0.7)
    assert return_residual(returns, values, REWARDS, MASK, 0.9, 0.7) < 1e-6
    assert return_residual(returns, values, REWARDS, MASK, 0.7, 0.9) > 1e-2
    assert return_residual(torch.zeros(0, 2), torch.zeros(0, 2), torch.zeros(0, 2), torch.zeros(0, 2).bool(), 1, 1) == 0


def test_whitened_advantages_by_hand() -> None:
    raw = torch.tensor([[1.0, 3.0, 100.0]])
    mask = torch.tensor([[True, True, False]])
    assert whitening_residual(torch.tensor([[-1.0, 1.0, 0.0]]), raw, mask, alone) == pytest.approx(0, abs=1e-6)
    assert whitening_residual(torch.tensor([[-1.0, 1.0, 0.5]]), raw, mask, alone) == pytest.approx(0.5)
    assert whitening_residual(torch.tensor([[-0.5, 1.5, 0.0]]), raw, mask, alone) == pytest.approx(0.5)  # the mean
    assert whitening_residual(torch.tensor([[-2.0, 2.0, 0.0]]), raw, mask, alone) == pytest.approx(3.0)  # 4 - 1
    same = torch.ones(1, 3)
    assert whitening_residual(masked_whiten(same, mask), same, mask, alone) == 0  # no variance to scale


def test_advantages_of_groups_by_hand() -> None:
    mask = torch.tensor([[True, True], [True, False]])
    assert group_residual(torch.tensor([[1.0, 1.0], [-1.0, 0.0]]), mask, 2) == 0
    assert group_residual(torch.tensor([[1.0, 1.0], [-0.5, 0.0]]), mask, 2) == pytest.approx(0.25)  # the mean
    assert group_residual(torch.tensor([[1.0, 0.0], [-0.5, 0.0]]), mask, 2) == pytest.approx(0.5)  # uneven
    assert group_residual(torch.tensor([[1.0, 1.0], [-1.0, 0.5]]), mask, 2) == pytest.approx(0.5)  # outside
    scores = torch.tensor([3.0, 1.0])
    for estimator in (rloo, grpo):
        assert group_residual(estimator(scores, 2)[:, None] * mask, mask, 2) < 1e-6


# ---- responses and networks ------------------------------------------------------------------------------------------

END = 9


@pytest.mark.parametrize(
    ("tokens", "numbers", "broken"),
    [
        ([1, 2, END, 3, 4, 5], [0, 0, 0, 1, 1, 1], 0),
        ([1, 2, 3, 4, 5], [0, 0, 1, 1, 1], 1),  # the end token is missing
        ([7, 1, 2, 3, 4, 5], [0, 0, 0, 1, 1, 1], 1),  # the mask starts one token too early
        ([1, END, END, 3, 4, 5], [0, 0, 0, 1, 1, 1], 1),  # an end token inside
        ([1, 2, END, 3, 4, END], [0, 0, 0, 1, 1, 1], 1),  # the second was truncated
        ([1, 2, END, 3, 4], [0, 0, 0, 1, 1], 1),  # and has too few tokens
        ([1, 2, END, 3, 4, 5], [0, 0, 0, 1, 1], 2),  # two masks of different sizes
    ],
)
def test_responses_by_hand(tokens: list[int], numbers: list[int], broken: int) -> None:
    """The first response has ended with its third token, the second was truncated after three."""
    assert broken_responses(torch.tensor(tokens), torch.tensor(numbers), [3, 3], [True, False], END, 3) == broken


def test_a_response_has_at_most_its_maximum_of_tokens() -> None:
    tokens, numbers = torch.tensor([1, 2]), torch.tensor([0, 0])
    assert broken_responses(tokens, numbers, [2], [False], END, 2) == 0
    assert broken_responses(tokens, numbers, [2], [False], END, 1) == 1


def test_prompts_by_hand() -> None:
    ids = torch.tensor([[1, 7, 8, 2, 3, 4, 7, 8, 5], [7, 8, 2, 3, 0, 0, 0, 0, 0]])
    sampled = torch.tensor([[0, 0, 0, 1, 1, 0, 0, 0, 1], [0, 0, 1, 1, 0, 0, 0, 0, 0]]).bool()
    assert broken_prompts(ids, sampled, [7, 8]) == 0
    assert broken_prompts(ids, sampled.roll(-1, 1), [7, 8]) == 3
    assert broken_prompts(ids, torch.ones_like(sampled), [7, 8]) == 2  # nothing before the first token
    assert broken_prompts(ids, sampled, []) == 0


def test_the_header_of_a_prompt_is_what_all_prompts_end_with(encoding: str) -> None:
    tokenizer = ChatTokenizer(encoding)
    header = prompt_header(tokenizer)
    assert 1 <= len(header) <= 2
    assert set(header) <= tokenizer.special_ids | set(tokenizer.encode("\n"))


def test_a_fingerprint_shows_a_change() -> None:
    network = nn.Linear(2, 2)
    network.bias.requires_grad_(False)
    whole, trained = fingerprint(network), fingerprint(network, trained_only=True)
    assert (len(whole), len(trained)) == (2, 1)
    with torch.no_grad():
        network.bias[0] += 1e-3
    assert fingerprint(network) != whole
    assert fingerprint(network, trained_only=True) == trained
    assert fingerprint(network.requires_grad_(False), trained_only=True) == []


def test_only_trained_weights_may_not_be_shared() -> None:
    policy, reference = nn.Linear(2, 2), nn.Linear(2, 2)
    assert shared_parameters(policy, reference) == 0
    reference.bias = policy.bias
    assert shared_parameters(policy, reference) == 1
    policy.bias.requires_grad_(False)
    assert shared_parameters(policy, reference) == 0


# ---- gradients -------------------------------------------------------------------------------------------------------


def test_gradients_of_the_policy_loss_by_hand() -> None:
    ratio = torch.tensor([1.0, 1.1, 1.5, 0.5, 0.5, 1.5, 1.2])
    advantages = torch.tensor([2.0, 2.0, 2.0, 2.0, -2.0, -2.0, 2.0])
    expected = [-2.0, -2.2, 0.0, -1.0, 0.0, 3.0, math.nan]
    found = policy_gradient(ratio, advantages, 0.2, None, None)
    torch.testing.assert_close(found, torch.tensor(expected), equal_nan=True)
    assert policy_gradient(ratio, advantages, 0.2, 0.28, None)[-1] == pytest.approx(-2.4)
    assert policy_gradient(ratio, advantages, 0.2, None, 1.4)[5] == 0


def test_gradients_of_the_value_loss_by_hand() -> None:
    """The old value is 0 and the clip range 0.5, so the clipped value is 0.5 for all but the first."""
    values = torch.tensor([0.2, 1.0, 1.0, 0.5])
    returns = torch.tensor([1.0, 2.0, 0.0, 2.0])
    # 1 is nearer to 2 than 0.5 is: the clipped error is larger, and constant. For the return 0, the plain one is.
    expected = torch.tensor([-0.8, 0.0, 1.0, math.nan])
    torch.testing.assert_close(value_gradient(values, torch.zeros(4), returns, 0.5), expected, equal_nan=True)


@pytest.mark.parametrize("clips", [{}, {"clip_eps_high": 0.5}, {"dual_clip": 1.5}])
def test_the_formulas_are_the_gradients_of_the_losses(clips: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, old, advantages, returns = (torch.randn(20, 30, generator=generator) for _ in range(4))
    mask = torch.rand(20, 30, generator=generator) < 0.7
    logprobs, values = x.clone().requires_grad_(), x.clone().requires_grad_()
    policy_loss(logprobs, old, advantages, mask, 0.2, 100, **clips).loss.backward()
    value_loss(values, old, returns, mask, 0.3, 100).loss.backward()
    options = (0.2, clips.get("clip_eps_high"), clips.get("dual_clip"))
    policy = policy_gradient((x - old).exp(), advantages, *options) / 100
    value = value_gradient(x, old, returns, 0.3) / 100
    assert logprobs.grad is not None
    assert values.grad is not None
    assert gradient_error(logprobs.grad, policy, mask, 0.01) < 1e-5
    assert gradient_error(values.grad, value, mask, 0.01) < 1e-5
    assert gradient_error(-logprobs.grad, policy, mask, 0.01) == pytest.approx(2, abs=0.01)
    assert gradient_error(values.grad, value, ~mask, 0.01) > 0.5


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_the_gradient_of_the_kl(kind: KLKind) -> None:
    logprobs, ref = torch.tensor([-1.0, -2.0], requires_grad=True), torch.tensor([-1.5, -1.0])
    kl_estimate(logprobs, ref, kind).sum().backward()
    torch.testing.assert_close(kl_gradient(logprobs.detach(), ref, kind), logprobs.grad)


def test_the_error_of_a_small_gradient_is_relative_to_a_term_of_a_thousandth() -> None:
    nothing, mask = torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool)
    rounding = torch.full((1, 4), 1e-9)  # norm 2e-9; the norm of four terms of 0.001 · 0.5 is 1e-3
    assert gradient_error(rounding, nothing, mask, 0.5) == pytest.approx(2e-6)


# ---- sampling --------------------------------------------------------------------------------------------------------


def test_evidence_of_repetition_by_hand() -> None:
    """Two rows repeat 2 and 0 tokens of 10 nats each: S = 20, and 20 - 2 - 2·log(20 / 2) nats."""
    ids, earlier = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[1, 2, 0], [0, 5, 6]])
    logprobs, mask = torch.full((2, 3), -10.0), torch.ones(2, 3, dtype=torch.bool)
    expected = 20 - 2 - 2 * math.log(10)
    assert repetition_evidence(ids, logprobs, mask, earlier, mask) == pytest.approx(expected)
    assert repetition_evidence(ids, logprobs / 100, mask, earlier, mask) == 0  # likely tokens may repeat
    shorter = torch.tensor([[True, False, False]] * 2)
    assert repetition_evidence(ids, logprobs, mask, earlier, shorter) == pytest.approx(10 - 2 - 2 * math.log(5))
    assert repetition_evidence(ids, logprobs, mask, earlier[:, :1], mask[:, :1]) == pytest.approx(
        10 - 2 - 2 * math.log(5)
    )


def test_surprisal_by_hand() -> None:
    """Differences of -0.5 and 2, with squares of 4.25 in sum, above the floor of 2 + 8·0.01."""
    surprisal = Surprisal()
    assert surprisal.deviations == 0
    surprisal.add(torch.tensor([-0.5, -2.01]), torch.tensor([1.0, 0.01]))
    assert surprisal.difference == pytest.approx(1.5)
    assert surprisal.squares == pytest.approx(4.25)
    assert surprisal.floor == pytest.approx(2.08)
    assert surprisal.deviations == pytest.approx(1.5 / math.sqrt(4.25))
    surprisal.add(torch.tensor([-0.5, -0.5]), torch.tensor([1.0, 1.0]))  # squares 4.75, floor 6.08
    assert surprisal.deviations == pytest.approx(0.5 / math.sqrt(6.08))


def drawn(logits: Tensor, top_k: int, tokens: int) -> Surprisal:
    """The surprisal of ``tokens`` tokens of the distribution ``logits`` [V], sampled with top-k."""
    logprobs = logits.log_softmax(0)
    kept = logprobs.topk(top_k)
    found = kept.values.exp().multinomial(tokens, replacement=True, generator=torch.Generator().manual_seed(0))
    entropy = -(logprobs.exp() * logprobs).sum()
    surprisal = Surprisal()
    surprisal.add(kept.values[found], entropy.expand(tokens))
    return surprisal


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0, 10.0])
def test_the_surprisal_of_draws_from_flat_to_peaked_distributions(scale: float) -> None:
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(1)) * scale
    for tokens in (10, 300, 10_000):
        assert abs(drawn(logits, 1000, tokens).deviations) < 4


@pytest.mark.parametrize("scale", [1.0, 2.0, 3.0])
def test_the_surprisal_shows_top_k(scale: float) -> None:
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(1)) * scale
    assert drawn(logits, 50, 2000).deviations < -6


def test_a_rare_token_that_was_not_sampled_yet_is_no_evidence() -> None:
    """Tokens of probability 0.999: the other 0.001 has not come up in 1,000 tokens, with a chance of 37 %."""
    entropy = -(0.999 * math.log(0.999) + 0.001 * math.log(0.001))
    surprisal = Surprisal()
    surprisal.add(torch.full((1000,), math.log(0.999)), torch.full((1000,), entropy))
    assert -2 < surprisal.deviations < 0
