"""The comparison of estimators: its statistics by hand, the ranked pairs of DPO, and runs that are not repeated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import estimators
from rlchat.models.model_file import load_policy


def test_the_interquartile_mean_by_hand() -> None:
    # Of eight values, the two lowest and the two highest are left out: (3 + 4 + 5 + 6) / 4.
    assert estimators.interquartile_mean(np.array([100, 1, 3, 5, 4, 6, -50, 7])) == 4.5
    assert estimators.interquartile_mean(np.array([[1, 2, 9], [4, 0, 2]])).tolist() == [
        4,
        2,
    ]  # a quarter of three is none


def test_an_interval_of_equal_values_is_that_value() -> None:
    assert estimators.with_interval([0.25] * 10) == "0.250 (0.250 to 0.250)"
    center, low, high = (
        float(x)
        for x in estimators.with_interval([0.0, 1.0] * 5).replace("(", "").replace(")", "").replace("to", "").split()
    )
    assert low < center < high


def test_the_reward_at_a_time_is_the_mean_of_three_iterations() -> None:
    curve = [{"cpu_s": float(i), "reward": float(i * i)} for i in range(10)]
    assert estimators.reward_at(curve, "cpu_s", 5.1) == pytest.approx((16 + 25 + 36) / 3)
    assert estimators.reward_at(curve, "cpu_s", 100.0) == pytest.approx((49 + 64 + 81) / 3)


def test_rewards_are_compared_at_the_highest_kl_that_both_reach() -> None:
    low = [{"kl": kl, "reward": reward} for kl, reward in ((0.0, 0.1), (4.0, 0.4), (3.0, 0.3))]
    high = [{"kl": kl, "reward": reward} for kl, reward in ((0.0, 0.1), (3.0, 0.5), (5.0, 0.6), (9.0, 0.9))]
    # At a KL of 4, the second curve is halfway between 0.5 and 0.6.
    assert estimators.gain_at_equal_kl(low, high) == pytest.approx(0.4 - 0.55)
    assert estimators.gain_at_equal_kl(high, low) == pytest.approx(0.55 - 0.4)


def test_the_true_reward_ranks_the_pairs(tmp_path: Path) -> None:
    size = estimators.SIZE
    estimators.save_initial(estimators.initial_model(size, 0), size, tmp_path / "initial.pt")
    bundle = load_policy(tmp_path / "initial.pt")
    ids = bundle.tokenizer.end_id, bundle.tokenizer.pad_id
    bundle.model.unsayable[ids[0]] = True
    batches = estimators.pairs(bundle.model, 0, *ids)
    assert sum(len(batch.ids) for batch in batches) == estimators.H.iterations * estimators.H.batch_size
    ranked = 0
    for batch in batches:
        assert batch.response_mask.sum(1).tolist() == [size.response] * len(batch.ids)
        replies = batch.ids[batch.response_mask].view(-1, size.response).tolist()
        scores = torch.tensor([estimators.reward(reply, size) for reply in replies]).view(-1, 2)
        rank = batch.rank.view(-1, 2)
        assert ((scores[:, 0] > scores[:, 1]) == (rank[:, 0] < rank[:, 1])).all()
        assert ((scores[:, 0] == scores[:, 1]) == (rank[:, 0] == rank[:, 1])).all()
        assert batch.group.view(-1, 2)[:, 0].tolist() == batch.group.view(-1, 2)[:, 1].tolist()
        ranked += int((rank[:, 0] != rank[:, 1]).sum())
    assert ranked > 100


def test_a_stored_run_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def train(arm: estimators.Arm, setting: dict[str, float], seed: int, folder: Path) -> dict[str, Any]:
        calls.append((arm.name, seed))
        return {
            "reward": 0.5,
            "kl": 1.0,
            "cpu_s": 2.0,
            "curve": [{"cpu_s": 1.0, "reward": 0.5, "kl": 1.0, "episodes": 64}],
        }

    monkeypatch.setattr(estimators, "train_online", train)
    arm = estimators.ARMS[0]
    first, second = (estimators.run(arm, arm.grid[0], 0, tmp_path) for _ in range(2))
    assert first == second
    assert calls == [(arm.name, 0)]
    assert [json.loads(path.read_text())["reward"] for path in tmp_path.glob("*.json")] == [0.5]
    lines = list(estimators.table({arm.name: [first]}, {arm.name: arm.grid[0]}))
    assert lines[2].startswith(f"| {arm.name} | learning_rate 0.003 | 0.500 (0.500 to 0.500) | 1.000")
