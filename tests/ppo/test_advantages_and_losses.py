"""The formulas of PPO: reference numbers, numbers worked out by hand, and properties of any numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlchat.ppo import (
    AdaptiveKL,
    gae,
    grpo,
    kl_estimate,
    masked_mean,
    masked_whiten,
    place_scores,
    policy_loss,
    reinforce_pp,
    rloo,
    shape_rewards,
    value_loss,
)
from rlchat.ppo.advantages import ESTIMATORS, EstimatorInputs
from rlchat.ppo.losses import KLKind

GOLDEN = Path(__file__).parents[1] / "data" / "ppo_golden.json"
KINDS: tuple[KLKind, ...] = get_args(KLKind)
quickly = settings(deadline=None, max_examples=60)


def t(*rows: Any) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def m(*rows: Any) -> Tensor:
    return torch.tensor(rows, dtype=torch.bool)


def close(found: Tensor, expected: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), atol=tolerance, rtol=0)


# ---- the reference numbers -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text())


def tensors(case: dict[str, Any], *names: str) -> Any:
    """The tensors ``names`` of ``case``, to unpack."""
    return [t(*case[name]) if name != "mask" else m(*case[name]) for name in names]


def test_golden_whitening(golden: dict[str, Any]) -> None:
    x, mask = tensors(golden["whiten"], "x", "mask")
    close(masked_whiten(x, mask), golden["whiten"]["shift_mean_true"])
    close(masked_whiten(x, mask, shift_mean=False), golden["whiten"]["shift_mean_false"])


@pytest.mark.parametrize("kind", KINDS)
def test_golden_kl(golden: dict[str, Any], kind: KLKind) -> None:
    logprobs, ref_logprobs, mask = tensors(golden["kl"], "logprobs", "ref_logprobs", "mask")
    close(masked_mean(kl_estimate(logprobs, ref_logprobs, kind), mask), golden["kl"][kind])


def test_golden_rewards(golden: dict[str, Any]) -> None:
    case = golden["shaped_reward"]
    logprobs, ref_logprobs, mask = tensors(case, "logprobs", "ref_logprobs", "mask")
    rewards = shape_rewards(t(*case["score"]), logprobs, ref_logprobs, mask, case["kl_coef"], case["kl_estimator"])
    close(rewards, case["rewards"])


def test_golden_gae(golden: dict[str, Any]) -> None:
    for case in (*golden["gae"], golden["gae_with_holes"]):
        rewards, values, mask = tensors(case, "rewards", "values", "mask")
        advantages, returns = gae(rewards, values, mask, case["gamma"], case["lam"])
        close(advantages, case["advantages"])
        close(returns[mask], t(*case["returns"])[mask])
        assert (returns[~mask] == 0).all()


def test_golden_policy_loss(golden: dict[str, Any]) -> None:
    case = golden["policy_loss"]
    logprobs, old, advantages, mask = tensors(case, "logprobs", "old_logprobs", "advantages", "mask")
    result = policy_loss(logprobs, old, advantages, mask, case["clip_eps"])
    for name, value in result._asdict().items():
        close(value, case[name])


def test_golden_value_loss(golden: dict[str, Any]) -> None:
    case = golden["value_loss"]
    values, old, returns, mask = tensors(case, "values", "old_values", "returns", "mask")
    result = value_loss(values, old, returns, mask, case["value_clip"])
    for name, value in result._asdict().items():
        close(value, case[name])


def test_golden_adaptive_kl(golden: dict[str, Any]) -> None:
    case = golden["adaptive_kl"]
    controller = AdaptiveKL(case["initial"], case["target"], case["horizon"])
    for step in case["steps"]:
        assert controller.update(step["kl"], step["episodes"]) == pytest.approx(step["coef"], abs=1e-12)


# ---- by hand ---------------------------------------------------------------------------------------------------------


def test_mean_by_hand() -> None:
    x, mask = t([1, 2, 100], [3, 100, 100]), m([1, 1, 0], [1, 0, 0])
    close(masked_mean(x, mask), 2.0)  # 6 / 3
    close(masked_mean(x, mask, count=4), 1.5)  # 6 / 4
    close(masked_mean(x, mask, count=torch.tensor(12)), 0.5)
    close(masked_mean(x, torch.zeros_like(mask)), 0.0)


def test_whitening_by_hand() -> None:
    # 1, 3 and 5: mean 3, biased variance (4 + 0 + 4) / 3.
    x, mask = t([1, 3, 77], [-99, 5, 77]), m([1, 1, 0], [0, 1, 0])
    a = 2 / math.sqrt(8 / 3 + 1e-8)
    close(masked_whiten(x, mask), [[-a, 0, 0], [0, a, 0]])
    close(masked_whiten(x, mask, shift_mean=False), [[3 - a, 3, 0], [0, 3 + a, 0]])
    close(masked_whiten(x, torch.zeros_like(mask)), [[0, 0, 0], [0, 0, 0]])
    close(masked_whiten(t([4.0]), m([True])), [[0.0]])  # one token has no variance, which must not divide by 0


def test_kl_by_hand() -> None:
    logprobs, ref = t([-1.0, -2.0, -3.0]), t([-1.0, -3.0, -1.0])  # d = 0, 1, -2
    close(kl_estimate(logprobs, ref, "k1"), [[0, 1, -2]])
    close(kl_estimate(logprobs, ref, "k2"), [[0, 0.5, 2]])
    close(kl_estimate(logprobs, ref, "k3"), [[0, 1 / math.e, math.e**2 - 3]])
    with pytest.raises(ValueError, match="'k4'"):
        kl_estimate(logprobs, ref, "k4")  # type: ignore[arg-type]


def test_rewards_by_hand() -> None:
    logprobs, ref = t([-1.0, -2.0, -9.0], [-3.0, -9.0, -9.0]), t([-1.5, -1.0, 0.0], [-1.0, 0.0, 0.0])
    mask = m([1, 1, 0], [1, 0, 0])  # d = 0.5, -1; -2
    close(shape_rewards(t(7.0, -5.0).squeeze(), logprobs, ref, mask, 0.1), [[-0.05, 0.1 + 7, 0], [0.2 - 5, 0, 0]])
    k2 = shape_rewards(t(7.0, -5.0).squeeze(), logprobs, ref, mask, 0.1, "k2")
    close(k2, [[-0.0125, -0.05 + 7, 0], [-0.2 - 5, 0, 0]])
    nobody = shape_rewards(t(7.0, -5.0).squeeze(), logprobs, ref, torch.zeros_like(mask), 0.1)
    close(nobody, [[0, 0, 0], [0, 0, 0]])


def test_gae_by_hand() -> None:
    """γ = 1/2 and λ = 1/2. Backwards: δ₂ = 4 - 2 = 2; δ₁ = 0 + 1 - 4 = -3, A₁ = -3 + 2/4 = -2.5;
    δ₀ = 1 + 2 - 2 = 1, A₀ = 1 - 2.5/4 = 0.375."""
    rewards, values = t([1, 0, 4]), t([2, 4, 2])
    advantages, returns = gae(rewards, values, m([1, 1, 1]), gamma=0.5, lam=0.5)
    close(advantages, [[0.375, -2.5, 2.0]])
    close(returns, [[2.375, 1.5, 4.0]])
    # The same with a user turn in between, whatever its values.
    rewards, values = t([1, 50, 0, -60, 70, 4, 9]), t([2, 8, 4, 8, 8, 2, 8])
    advantages, returns = gae(rewards, values, m([1, 0, 1, 0, 0, 1, 0]), gamma=0.5, lam=0.5)
    close(advantages, [[0.375, 0, -2.5, 0, 0, 2.0, 0]])
    close(returns, [[2.375, 0, 1.5, 0, 0, 4.0, 0]])


def decoupled(lam_critic: float | None) -> tuple[Tensor, Tensor]:
    """Advantages and returns of the rewards, values, γ and λ of the test above, and a user turn."""
    rewards, values, mask = t([1, 50, 0, 4]), t([2, 8, 4, 2]), m([1, 0, 1, 1])
    inputs = EstimatorInputs(rewards, values, mask, 1, 0.5, 0.5, lambda x: x, lam_critic)
    return ESTIMATORS["gae"].compute(inputs)


def test_two_lambdas_by_hand() -> None:
    """The advantages keep λ: 0.375, -2.5 and 2, mean -1/24. With λ_critic = 1, the returns are the discounted rewards
    to go: 4, 0 + 4/2, 1 + 2/2. With λ_critic = 0, they are r + γ·V_next: 4, 0 + 2/2, 1 + 4/2."""
    raw = t([0.375, -2.5, 2.0])[0]
    white = (raw - raw.mean()) / (raw.var(unbiased=False) + 1e-8).sqrt()
    for lam_critic, returns in ((None, [2.375, 1.5, 4]), (0.5, [2.375, 1.5, 4]), (1.0, [2, 2, 4]), (0.0, [3, 1, 4])):
        advantages, found = decoupled(lam_critic)
        close(advantages, [[white[0], 0, white[1], white[2]]])
        close(found, [[returns[0], 0, returns[1], returns[2]]])


def test_policy_loss_by_hand() -> None:
    """Ratios 1, 2, 2, 1/2, 1/2 and advantages 3, 1, -1, 1, -1; the clip is at 0.8 and 1.2."""
    old = torch.full((1, 6), -2.0, dtype=torch.float64)
    log_ratio = t([0, math.log(2), math.log(2), -math.log(2), -math.log(2), 5])
    advantages = t([3, 1, -1, 1, -1, 1000])
    result = policy_loss(old + log_ratio, old, advantages, m([1, 1, 1, 1, 1, 0]), clip_eps=0.2)
    close(result.loss, (-3 - 1.2 + 2 - 0.5 + 0.8) / 5)
    close(result.clipfrac, 2 / 5)  # only if clipping increases the loss: 2 with A > 0, 1/2 with A < 0
    close(result.approx_kl, 4 / 5 * math.log(2) ** 2 / 2)
    close(policy_loss(old + log_ratio, old, advantages, m([1, 1, 1, 1, 1, 0]), 0.2, count=10).loss, -1.9 / 10)


def test_policy_gradient_by_hand() -> None:
    logprobs = t([-2.0, -2.0, -2.0 + math.log(2), -2.0 + math.log(2)]).requires_grad_()
    old = torch.full((1, 4), -2.0, dtype=torch.float64)
    policy_loss(logprobs, old, t([3, -1, 1, -1]), m([1, 1, 1, 1])).loss.backward()
    assert logprobs.grad is not None
    close(logprobs.grad, [[-3 / 4, 1 / 4, 0, 2 / 4]])  # -A·r / n, and 0 where the ratio is clipped


def test_value_loss_by_hand() -> None:
    """Old 0, clip 0.2. v = 1, R = 1: 0 or (0.2 - 1)²; v = 1, R = 0: 1 or 0.04; v = 0.1, R = 1: 0.81 either way."""
    values, returns = t([1, 1, 0.1, 9]), t([1, 0, 1, -9])
    result = value_loss(values, torch.zeros_like(values), returns, m([1, 1, 1, 0]), value_clip=0.2)
    close(result.loss, 0.5 * (0.64 + 1 + 0.81) / 3)
    close(result.clipfrac, 1 / 3)
    close(value_loss(values, torch.zeros_like(values), returns, m([1, 1, 1, 0]), 0.2, count=6).loss, 0.5 * 2.45 / 6)


def test_value_gradient_by_hand() -> None:
    values = t([1, 1, 0.1]).requires_grad_()
    value_loss(values, torch.zeros(1, 3, dtype=torch.float64), t([1, 0, 1]), m([1, 1, 1])).loss.backward()
    assert values.grad is not None
    close(values.grad, [[0, 1 / 3, -0.9 / 3]])  # (v - R) / n, and 0 where the clipped value has the larger loss


def test_scores_are_placed_on_the_last_token_of_each_response_by_hand() -> None:
    """Two turns in the first row with a user turn between them, one in the second, none in the third."""
    reply_of = torch.tensor([[0, 0, -1, 2, 2, 2], [1, 1, 1, -1, -1, -1], [-1, -1, -1, -1, -1, -1]])
    placed = place_scores(t(1, 2, 4), reply_of)
    close(placed, [[0, 1, 0, 0, 0, 4], [0, 0, 2, 0, 0, 0], [0] * 6])
    # The rewards are then the same as for scores per row.
    mask = reply_of >= 0
    half = torch.full(mask.shape, 0.5, dtype=torch.float64)
    rewards = shape_rewards(placed, half, torch.zeros_like(half), mask, kl_coef=0.2)
    close(rewards, [[-0.1, 0.9, 0, -0.1, -0.1, 3.9], [-0.1, -0.1, 1.9, 0, 0, 0], [0] * 6])


def test_gae_is_carried_across_user_turns_by_hand() -> None:
    """γ = 1, λ = 1/2, values of 0, rewards 1 and 4 at the ends of two turns; each step back halves the advantage."""
    mask = m([1, 1, 0, 1, 1])
    advantages, returns = gae(t([0, 1, 0, 0, 4]), t([0, 0, 9, 0, 0]), mask, 1.0, 0.5)
    close(advantages, [[1, 2, 0, 2, 4]])  # 4; 0 + 4/2; 1 + 2/2; 0 + 2/2
    close(returns, [[1, 2, 0, 2, 4]])


def test_rloo_by_hand() -> None:
    """(1, 2, 6): the means of the others are 4, 7/2 and 3/2. Equal scores give 0. The sum over a group is 0."""
    close(rloo(t(1, 2, 6, 5, 5, 5), 3), [-3, -1.5, 4.5, 0, 0, 0])
    close(rloo(t(1, 3), 2), [-2, 2])


def test_grpo_by_hand() -> None:
    """(1, 2, 6): mean 3, sample variance (4 + 1 + 9) / 2 = 7. Equal scores give 0."""
    scale = 1 / (7**0.5 + 1e-4)
    close(grpo(t(1, 2, 6, 5, 5, 5), 3), [-2 * scale, -scale, 3 * scale, 0, 0, 0])


def test_reinforce_pp_by_hand() -> None:
    """γ = 1/2. Row 1: G = 4, 0 + 4/2 = 2, 1 + 2/2 = 2. Row 2: G = 8, 0 + 8/2 = 4. Mean 20/5 = 4, variance 24/5."""
    rewards, mask = t([1, 0, 4, 99], [0, 8, 99, 99]), m([1, 1, 1, 0], [1, 1, 0, 0])
    s = 1 / math.sqrt(24 / 5 + 1e-8)
    close(reinforce_pp(rewards, mask, gamma=0.5), [[-2 * s, -2 * s, 0, 0], [0, 4 * s, 0, 0]])
    # The same with a user turn between two tokens of the first row.
    rewards, mask = t([1, 99, 0, 4], [0, 8, 99, 99]), m([1, 0, 1, 1], [1, 1, 0, 0])
    close(reinforce_pp(rewards, mask, gamma=0.5), [[-2 * s, 0, -2 * s, 0], [0, 4 * s, 0, 0]])
    # Without a discount, G = 5, 4, 4 and 8, 8: mean 29/5.
    variance = (0.8**2 + 2 * 1.8**2 + 2 * 2.2**2) / 5
    s = 1 / math.sqrt(variance + 1e-8)
    close(reinforce_pp(rewards, mask), [[-0.8 * s, 0, -1.8 * s, -1.8 * s], [2.2 * s, 2.2 * s, 0, 0]])


@pytest.mark.parametrize("estimate", [rloo, grpo])
@pytest.mark.parametrize("group_size", [1, 0, -1])
def test_a_group_of_one_response_is_refused(estimate: Callable[[Tensor, int], Tensor], group_size: int) -> None:
    """There is nothing to compare it with: both formulas divide 0 by 0."""
    with pytest.raises(ValueError, match=f"group_size is {group_size}: expected 2 or more responses to each prompt"):
        estimate(t(1, 2), group_size)


@given(st.lists(st.floats(-10, 10), min_size=12, max_size=12), st.sampled_from([2, 3, 4, 6]), st.floats(-5, 5))
@quickly
def test_scores_are_only_compared_within_their_group(scores: list[float], size: int, shift: float) -> None:
    """The advantages of a group sum to 0 and depend neither on its mean nor on other groups."""
    x = torch.tensor(scores, dtype=torch.float64)
    for compare in (rloo, grpo):
        advantages = compare(x, size)
        close(advantages.view(-1, size).sum(1), torch.zeros(12 // size), 1e-8)
        moved = x.clone()
        moved[:size] += shift
        close(compare(moved, size), advantages, 1e-6)
    # REINFORCE with the group's mean as the baseline, up to the factor n / (n - 1).
    centred = x.view(-1, size) - x.view(-1, size).mean(1, keepdim=True)
    close(rloo(x, size), (centred * size / (size - 1)).flatten(), 1e-8)


def test_clip_higher_by_hand() -> None:
    """Ratio 1.5 and A = 1: clipped at 1.2 or at 1.28. Ratio 0.5 and A = -1: clipped at 0.8 in both cases."""
    new, old, mask = t([1.5, 0.5]).log(), t([1, 1]).log(), m([1, 1])
    advantages = t([1, -1])
    close(policy_loss(new, old, advantages, mask).loss, (-1.2 + 0.8) / 2)
    found = policy_loss(new, old, advantages, mask, clip_eps_high=0.28)
    close(found.loss, (-1.28 + 0.8) / 2)
    close(found.clipfrac, 1)


def test_dual_clip_by_hand() -> None:
    """Ratio 5 and A = -1: the loss is 5, or 3 with c = 3. Positive advantages are not affected."""
    new, old, mask = t([5, 5]).log(), t([1, 1]).log(), m([1, 1])
    close(policy_loss(new, old, t([-1, 1]), mask).loss, (5 - 1.2) / 2)
    found = policy_loss(new, old, t([-1, 1]), mask, dual_clip=3.0)
    close(found.loss, (3 - 1.2) / 2)
    close(found.clipfrac, 1)
    leaf = new.clone().requires_grad_()
    policy_loss(leaf, old, t([-1, 1]), mask, dual_clip=3.0).loss.backward()
    assert leaf.grad is not None
    close(leaf.grad, [[0, 0]])  # no gradient beyond either bound


def test_adaptive_kl_by_hand() -> None:
    controller = AdaptiveKL(initial=0.5, target=6.0, horizon=1000)
    assert controller.update(6.0, 100) == 0.5  # on target
    assert controller.update(6.6, 100) == pytest.approx(0.5 * 1.01)  # a tenth above, a tenth of the horizon
    controller.coef = 0.5
    assert controller.update(600.0, 100) == pytest.approx(0.5 * 1.02)  # at most a fifth
    controller.coef = 0.5
    assert controller.update(-3.0, 500) == pytest.approx(0.5 * 0.9)
    assert controller.coef == pytest.approx(0.45)


def test_values_are_clipped_around_the_old_values() -> None:
    """Old 0, new 1, c = 0.2. The clipped value is 0.2; around the new value it would be 1."""
    values, old, mask = t([1.0]), t([0.0]), m([1])
    close(value_loss(values, old, t([1.0]), mask, 0.2).loss, 0.5 * 0.8**2)
    close(value_loss(values, old, t([2.0]), mask, 0.2).loss, 0.5 * 1.8**2)
    close(value_loss(values, values, t([2.0]), mask, 0.2).loss, 0.5 * 1.0)  # nothing to clip: old and new are equal
    close(value_loss(values, old, t([1.0]), mask, 0.2).clipfrac, 1.0)


def test_k3_of_small_differences_in_float32() -> None:
    """d²/2 for small d; exp(-d) - 1 + d in float32 is negative at d = 1e-5."""
    d = torch.tensor([1e-5, -1e-5, 1e-4, 1e-3])
    assert d.dtype == torch.float32
    torch.testing.assert_close(kl_estimate(d, torch.zeros(4), "k3"), d**2 / 2, rtol=0.03, atol=0)
    sweep = torch.logspace(-12, 1, 2000)
    for signed in (sweep, -sweep):
        assert (kl_estimate(signed, torch.zeros_like(signed), "k3") >= 0).all()


@pytest.mark.parametrize("score", [0.1, 1 / 3, 1e4 + 0.1, -7.3])
@pytest.mark.parametrize("size", [2, 3, 6, 7])
def test_equal_scores_give_exactly_zero(score: float, size: int) -> None:
    """In float32, the mean of equal numbers can differ from them by rounding."""
    scores = torch.full((2 * size,), score)
    assert (grpo(scores, size) == 0).all()
    assert (rloo(scores, size) == 0).all()


def test_whitening_ignores_nan_outside_the_mask() -> None:
    x, mask = t([1, 3, math.nan], [math.inf, 5, math.nan]), m([1, 1, 0], [0, 1, 0])
    a = 2 / math.sqrt(8 / 3 + 1e-8)
    close(masked_whiten(x, mask), [[-a, 0, 0], [0, a, 0]])
    close(masked_whiten(x, mask, shift_mean=False), [[3 - a, 3, 0], [0, 3 + a, 0]])


# ---- properties ------------------------------------------------------------------------------------------------------

numbers = st.floats(-5, 5, width=32)


@st.composite
def batches(draw: st.DrawFn, tensors: int, prefix: bool = False) -> tuple[Tensor, ...]:
    """A mask [B, T] with at least one token, and ``tensors`` of that shape; with ``prefix``, one response per row."""
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    if prefix:
        lengths = draw(st.lists(st.integers(1, width), min_size=rows, max_size=rows))
        mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    else:
        cells = st.lists(st.booleans(), min_size=rows * width, max_size=rows * width).filter(any)
        mask = torch.tensor(draw(cells)).view(rows, width)
    values = st.lists(numbers, min_size=rows * width, max_size=rows * width)
    return mask, *(torch.tensor(draw(values), dtype=torch.float64).view(rows, width) for _ in range(tensors))


def padded(x: Tensor, left: int, right: int) -> Tensor:
    """``x`` between padding columns, whose numbers would change the results if they were used."""
    return torch.nn.functional.pad(x, (left, right), value=False if x.dtype == torch.bool else 3.5)


def unpadded(x: Tensor, left: int, right: int) -> Tensor:
    assert (x[:, :left] == 0).all()
    assert (x[:, x.shape[1] - right :] == 0).all()
    return x[:, left : x.shape[1] - right]


@given(batches(1))
@quickly
def test_whitened_numbers_have_mean_0_and_variance_1(batch: tuple[Tensor, ...]) -> None:
    mask, x = batch
    white = masked_whiten(x, mask)
    inside = x[mask]
    variance = float(inside.var(unbiased=False))
    close(white[mask].mean(), 0.0, 1e-6)
    close(white[mask].var(unbiased=False), variance / (variance + 1e-8), 1e-6)
    assert (white[~mask] == 0).all()
    kept = masked_whiten(x, mask, shift_mean=False)
    close(kept[mask].mean(), inside.mean(), 1e-6)
    close(kept[mask] - white[mask], inside.mean().expand(len(inside)), 1e-6)


@given(batches(1), st.integers(0, 4))
@quickly
def test_whitening_in_shards_equals_whitening_of_the_whole(batch: tuple[Tensor, ...], at: int) -> None:
    """With sums over two processes, each process gets its part of the whitened whole."""
    mask, x = batch
    inside = x[mask]
    totals = [len(inside), inside.sum(), (inside - inside.mean()).square().sum()]
    sent: list[Tensor] = []

    def reduce(part: Tensor) -> Tensor:
        sent.append(part)
        return torch.as_tensor(totals[(len(sent) - 1) % 3], dtype=torch.float64)

    shards = [masked_whiten(x[rows], mask[rows], reduce=reduce) for rows in (slice(0, at), slice(at, None))]
    close(torch.cat(shards), masked_whiten(x, mask), 1e-9)
    for first, second, total in zip(sent[:3], sent[3:], totals, strict=True):
        close(first + second, total, 1e-9)


@given(batches(1), st.integers(0, 4), st.floats(0, 1))
@quickly
def test_reinforce_pp_in_shards_equals_that_of_the_whole(batch: tuple[Tensor, ...], at: int, gamma: float) -> None:
    mask, rewards = batch
    shards = [(rewards[rows], mask[rows]) for rows in (slice(0, at), slice(at, None))]
    to_go = [gae(r, torch.zeros_like(r), m, gamma, 1.0)[0][m] for r, m in shards]
    inside = torch.cat(to_go)
    totals = [torch.tensor(len(inside)), inside.sum(), (inside - inside.mean()).square().sum()]
    sums = cycle(totals)
    found = [reinforce_pp(r, m, gamma, lambda _: next(sums).double()) for r, m in shards]
    close(torch.cat(found), reinforce_pp(rewards, mask, gamma), 1e-9)


@given(batches(2, prefix=True), st.floats(-5, 5), st.floats(0.5, 4))
@quickly
def test_reinforce_pp_depends_neither_on_the_origin_nor_on_the_unit_of_scores(
    batch: tuple[Tensor, ...], shift: float, scale: float
) -> None:
    """Without a discount, each token of a response gets the whole score, whatever the lengths of the responses."""
    mask, logprobs, ref_logprobs = batch
    scores = torch.arange(len(mask), dtype=torch.float64)

    def rewards(scores: Tensor, kl_coef: float) -> Tensor:
        return shape_rewards(scores, logprobs, ref_logprobs, mask, kl_coef)

    expected = reinforce_pp(rewards(scores, 0.3), mask)
    close(reinforce_pp(rewards(scores + shift, 0.3), mask), expected, 1e-6)
    if float(expected[mask].var(unbiased=False)) > 0.99:  # else the variance is as small as the 1e-8 in the divisor
        close(reinforce_pp(rewards(scores * scale, 0.3 * scale), mask), expected, 1e-2)


@given(batches(2), st.floats(0, 1), st.floats(0, 1))
@quickly
def test_gae_with_gaps_equals_gae_of_the_compacted_sequence(
    batch: tuple[Tensor, ...], gamma: float, lam: float
) -> None:
    mask, rewards, values = batch
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    assert (advantages[~mask] == 0).all()
    assert (returns[~mask] == 0).all()
    for row, keep in enumerate(mask):
        if keep.any():
            whole = m([True] * int(keep.sum()))
            compact = gae(rewards[row][keep][None], values[row][keep][None], whole, gamma, lam)
            close(advantages[row][keep], compact[0][0])
            close(returns[row][keep], compact[1][0])


@given(batches(2), st.floats(0, 1))
@quickly
def test_with_lam_1_advantages_are_discounted_returns_minus_values(batch: tuple[Tensor, ...], gamma: float) -> None:
    mask, rewards, values = batch
    advantages, returns = gae(rewards, values, mask, gamma, lam=1.0)
    for row, keep in enumerate(mask):
        left = 0.0
        for reward, value, advantage, found in reversed(
            [*zip(rewards[row][keep], values[row][keep], advantages[row][keep], returns[row][keep], strict=True)]
        ):
            left = float(reward) + gamma * left
            assert float(found) == pytest.approx(left, abs=1e-9)
            assert float(advantage) == pytest.approx(left - float(value), abs=1e-9)


@given(batches(2), st.floats(0, 1))
@quickly
def test_with_lam_0_advantages_are_one_step_errors(batch: tuple[Tensor, ...], gamma: float) -> None:
    mask, rewards, values = batch
    advantages, _ = gae(rewards, values, mask, gamma, lam=0.0)
    for row, keep in enumerate(mask):
        v = [*values[row][keep].tolist(), 0.0]
        for i, reward in enumerate(rewards[row][keep].tolist()):
            assert float(advantages[row][keep][i]) == pytest.approx(reward + gamma * v[i + 1] - v[i], abs=1e-9)


@given(batches(5), st.integers(0, 3), st.integers(0, 3))
@quickly
def test_padding_does_not_change_the_results(batch: tuple[Tensor, ...], left: int, right: int) -> None:
    mask, a, b, c, d = batch[0], *batch[1:5]
    wide = [padded(x, left, right) for x in (mask, a, b, c, d)]
    close(masked_mean(wide[1], wide[0]), masked_mean(a, mask))
    for one, other in zip(policy_loss(wide[1], wide[2], wide[3], wide[0]), policy_loss(a, b, c, mask), strict=True):
        close(one, other)
    for one, other in zip(value_loss(wide[1], wide[2], wide[3], wide[0]), value_loss(a, b, c, mask), strict=True):
        close(one, other)
    close(unpadded(masked_whiten(wide[1], wide[0]), left, right), masked_whiten(a, mask))
    for one, other in zip(gae(wide[1], wide[2], wide[0]), gae(a, b, mask), strict=True):
        close(unpadded(one, left, right), other)
    scores = d[:, 0]
    shaped = shape_rewards(scores, wide[1], wide[2], wide[0], 0.3)
    close(unpadded(shaped, left, right), shape_rewards(scores, a, b, mask, 0.3))


@given(batches(3))
@quickly
def test_values_outside_the_mask_have_no_gradient(batch: tuple[Tensor, ...]) -> None:
    mask, a, b, c = batch
    for loss in (policy_loss, value_loss):
        x = a.clone().requires_grad_()
        # Padding may contain any value, even one that overflows.
        loss(x, torch.where(mask, b, -1e4), c, mask).loss.backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert (x.grad[~mask] == 0).all()


@given(batches(2, prefix=True), st.sampled_from(KINDS), st.floats(0, 1))
@quickly
def test_the_score_is_on_one_token_for_any_length(batch: tuple[Tensor, ...], kind: KLKind, kl_coef: float) -> None:
    mask, logprobs, ref_logprobs = batch
    scores = torch.arange(1, len(mask) + 1, dtype=torch.float64) * 10
    paid = shape_rewards(scores, logprobs, ref_logprobs, mask, kl_coef, kind) - shape_rewards(
        torch.zeros_like(scores), logprobs, ref_logprobs, mask, kl_coef, kind
    )
    close(paid.sum(1), scores, 1e-9)
    for row, length in zip(paid, mask.sum(1).tolist(), strict=True):
        assert [i for i, x in enumerate(row.tolist()) if abs(x) > 1e-6] == [length - 1]


@given(batches(2))
@quickly
def test_k2_and_k3_are_never_negative(batch: tuple[Tensor, ...]) -> None:
    _, logprobs, ref_logprobs = batch
    for kind in ("k2", "k3"):
        assert (kl_estimate(logprobs, ref_logprobs, kind) >= -1e-12).all()
        assert (kl_estimate(logprobs, logprobs, kind) == 0).all()


def test_the_means_of_k1_and_k3_are_the_true_kl() -> None:
    p, q = t([0.5, 0.3, 0.2])[0], t([0.2, 0.2, 0.6])[0]
    true = float((p * (p / q).log()).sum())
    for kind in ("k1", "k3"):
        assert float((p * kl_estimate(p.log(), q.log(), kind)).sum()) == pytest.approx(true)


@given(batches(3), st.integers(0, 4), st.integers(2, 4))
@quickly
def test_the_mean_of_shard_gradients_equals_the_global_gradient(batch: tuple[Tensor, ...], at: int, world: int) -> None:
    """Each process divides by global tokens / processes, and the gradients are averaged, as in DDP."""
    mask, a, b, c = batch
    mask = torch.cat([mask, m([True] * mask.shape[1])])  # enough tokens for every process
    mask = torch.cat([mask] * world)
    a, b, c = (torch.cat([torch.cat([x, x[:1]])] * world) for x in (a, b, c))
    count = mask.sum() / world
    for loss in (policy_loss, value_loss):
        x = a.clone().requires_grad_()
        whole = loss(x, b, c, mask)
        whole.loss.backward()
        expected, x.grad = x.grad, None
        cuts = [0, *sorted((at + i * len(mask) // world) % (len(mask) + 1) for i in range(1, world)), len(mask)]
        losses = []
        for start, end in pairwise(cuts):  # unequal shards, some possibly empty
            part = loss(x[start:end], b[start:end], c[start:end], mask[start:end], count=count)
            (part.loss / world).backward()
            losses.append(part.loss.detach() / world)
        assert x.grad is not None
        assert expected is not None
        close(x.grad, expected)
        close(torch.stack(losses).sum(), whole.loss.detach())


@given(st.floats(0, 100), st.integers(1, 1000))
@quickly
def test_the_coefficient_rises_and_falls_with_the_kl(kl: float, episodes: int) -> None:
    before = 0.1
    after = AdaptiveKL(before, 6.0, 10_000).update(kl, episodes)
    assert (after > before) == (kl > 6)
    assert abs(after / before - 1) <= 0.2 * episodes / 10_000 + 1e-12


@pytest.mark.parametrize("score", [3.3, -7.3, 1e-3, 0.0])
def test_equal_values_are_whitened_to_0(score: float) -> None:
    x = torch.full((128, 256), score)  # float32: the mean of equal numbers has a rounding error
    assert masked_whiten(x, torch.ones_like(x, dtype=torch.bool)).tolist() == torch.zeros_like(x).tolist()
