"""DPO beside PPO: accuracy at a KL by hand, the table, stored results, and a whole study in miniature."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import preferences

CURVE = [{"kl": kl, "sampled": right} for kl, right in ((0.0, 0.5), (1.0, 0.6), (0.8, 0.7), (2.0, 0.9))]


@pytest.mark.parametrize(("kl", "expected"), [(0.0, 0.5), (0.25, 0.525), (0.9, 0.59), (1.4, 0.8), (2.0, 0.9)])
def test_accuracy_at_a_kl_is_linear_where_the_run_first_reaches_it(kl: float, expected: float) -> None:
    assert preferences.at_kl(CURVE, kl, "sampled") == pytest.approx(expected)


def test_a_kl_that_is_not_reached_has_no_accuracy() -> None:
    assert math.isnan(preferences.at_kl(CURVE, 2.1, "sampled"))
    flat = [{"kl": 0.0, "sampled": 0.5}, {"kl": 0.0, "sampled": 0.7}]
    assert preferences.at_kl(flat, 0.0, "sampled") == 0.7


def test_means_have_t_intervals() -> None:
    # Standard deviation 1 % of three values, and 4.303 / √3 = 2.484 for 95 %.
    assert preferences.shown([0.51, 0.52, 0.53], 2) == "52.00 ± 2.48"
    assert preferences.shown([0.51, math.nan, 0.53]).endswith("(2 runs)")
    assert preferences.shown([math.nan, 0.5]) == "50.0 (1 run)"
    assert preferences.shown([math.nan]) == "not reached"


def test_the_table_compares_runs_of_the_same_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preferences, "KLS", (0.5, 1.0, 2.0, 4.0))

    def runs(*rises: float) -> list[dict[str, Any]]:
        return [{"curve": [{"kl": 0.0, "sampled": 0.5}, {"kl": 2.0, "sampled": 0.5 + rise}]} for rise in rises]

    lines = list(preferences.table({"DPO": runs(0.1, 0.2), "PPO": runs(0.14, 0.24)}, "sampled"))
    cells = [line.strip("| ").split(" | ") for line in lines]
    assert cells[0][1:5] == ["KL 0.5", "KL 1", "KL 2", "KL 4"]
    assert cells[2][0] == "DPO"
    assert cells[2][3].startswith("65.0 ±")
    assert cells[2][4] == "not reached"
    assert cells[4][:5] == ["PPO minus DPO", "1.0 ± 0.0", "2.0 ± 0.0", "4.0 ± 0.0", "not reached"]


def test_a_stored_result_is_not_computed_again(tmp_path: Path) -> None:
    study = preferences.Study(tmp_path)
    assert study.result("run", lambda: {"x": 1})["x"] == 1
    assert study.result("run", lambda: pytest.fail("computed again"))["x"] == 1
    assert json.loads((tmp_path / "run.json").read_text())["x"] == 1


def test_a_study_in_miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    small = {"TREES": 40, "HELD_OUT_TREES": 6, "WIDTH": {"hidden_size": 16, "intermediate_size": 16}, "SFT_EPOCHS": 1}
    small |= {"REWARD_EPOCHS": 1, "DPO_EPOCHS": 1, "PPO_ITERATIONS": 8, "PPO_BATCH": 4, "MEASUREMENTS": 1}
    for name, value in {**small, "DPO_BETAS": (0.1,), "KL_COEFS": (0.1,), "MAX_NEW_TOKENS": 4}.items():
        monkeypatch.setattr(preferences, name, value)
    monkeypatch.setattr(
        "sys.argv", ["preferences", "--seeds", "0", "1", "--out", str(tmp_path), "--plot", str(tmp_path / "p.png")]
    )
    preferences.main()
    assert "minus DPO" in capsys.readouterr().out
    assert (tmp_path / "p.png").stat().st_size > 10_000
    curves = {path.stem: json.loads(path.read_text()).get("curve") for path in tmp_path.glob("*-?.json")}
    assert set(curves) == {f"{kind}-{seed}" for kind in ("reward", "dpo-0.1", "ppo-0.1") for seed in (0, 1)}
    for name, curve in curves.items():
        if curve:
            assert curve[0]["kl"] == 0, name  # the policy is the SFT model
            assert curve[-1]["kl"] != 0, name
    with monkeypatch.context() as other:
        other.setattr(preferences, "DPO_RATE", 0.1)
        with pytest.raises(SystemExit, match="results with other settings"):
            preferences.main()
    # The seed draws the order of the data and the noise of sampling.
    assert curves["dpo-0.1-0"][-1] != curves["dpo-0.1-1"][-1]
    assert curves["dpo-0.1-0"][0] == curves["ppo-0.1-1"][0]  # that of the SFT model
