"""The figure of a run: panels, labels, smoothing and the limits of axes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from rlchat.callbacks.stats_curves import Curve, fence, limits, spread_labels
from rlchat.callbacks.stats_figure import draw_stats


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in [*figure.texts, *(text for axes in figure.axes for text in axes.texts)]]


def curve(n: int, start: float = 1.0) -> tuple[list[int], list[float]]:
    return list(range(1, n + 1)), [start / (1 + k) for k in range(n)]


@pytest.mark.parametrize(
    ("metrics", "titles"),
    [
        (["train/loss", "train/accuracy", "val/accuracy", "val/perplexity"], ["Loss", "Token accuracy", "Perplexity"]),
        (
            ["train/loss", "val/pair_accuracy", "val/right_over_wrong"],
            ["Loss", "Pair accuracy", "Correct above incorrect"],
        ),
        (
            ["train/reward", "reward/too_long", "train/policy_loss", "train/value_loss", "train/entropy", "val/kl"],
            ["Reward", "Reward by factor", "Policy loss", "Value loss", "Entropy", "KL to the reference model"],
        ),
    ],
)
def test_one_panel_for_each_logged_metric(metrics: list[str], titles: list[str]) -> None:
    figure = draw_stats({name: curve(30) for name in metrics} | {"train/learning_rate": curve(30)}, "my_run")
    assert len(figure.axes) == len(titles)
    assert set(titles) < set(texts(figure))
    assert {"my_run", "30 training batches"} < set(texts(figure))


def test_train_and_validation_share_a_panel_and_the_legend_names_both() -> None:
    figure = draw_stats({"train/kl": curve(30), "val/kl": ([10, 20], [0.5, 0.25])}, "run")
    (axes,) = figure.axes
    validation = [line for line in axes.lines if line.get_marker() == "o"]
    assert [list(line.get_ydata()) for line in validation] == [[0.5, 0.25]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "training",
        "training, smoothed",
        "validation",
    ]


@pytest.mark.parametrize("values", [[1.0], [math.nan], [math.nan, math.inf, 2.0], [0.0] * 40, [1e300, -1e300] * 20])
def test_any_values_can_be_drawn(values: list[float]) -> None:
    steps = list(range(1, len(values) + 1))
    history = dict.fromkeys(("train/reward", "train/perplexity", "val/loss", "reward/a"), (steps, values))
    draw_stats(history, "run").savefig("run.png", dpi=20)


def test_names_are_shown_as_they_are_written() -> None:
    history = {f"reward/cost_$\\frac{{{n}_{'x' * 50}": curve(5) for n in range(20)}
    figure = draw_stats(history, "$\\frac{a$")
    figure.savefig("run.png", dpi=20)  # an invalid formula would raise here
    assert "per response, weight included; the 12 largest of 20" in texts(figure)


def test_values_that_are_not_finite_are_crossed_on_the_axis() -> None:
    figure = draw_stats({"train/loss": ([1, 2, 3, 4], [1.0, math.nan, 2.0, math.inf])}, "run")
    (crosses,) = [line for line in figure.axes[0].lines if line.get_marker() == "x"]
    assert list(crosses.get_xdata()) == [2, 4]


def test_smoothing_keeps_a_straight_line_and_does_not_spread_gaps() -> None:
    line = [3.0 - 0.5 * step for step in range(200)]
    line[50] = math.nan
    smoothed = Curve.of(range(200), line).smoothed()
    assert np.isnan(smoothed).nonzero()[0].tolist() == [50]
    np.testing.assert_allclose(np.delete(smoothed, 50), np.delete(np.array(line), 50), atol=1e-8)


def test_smoothing_averages_noise() -> None:
    noise = np.random.default_rng(0).standard_normal(2000)
    assert Curve.of(range(2000), noise.tolist()).smoothed().std() < 0.15


def test_one_outlier_does_not_flatten_the_rest() -> None:
    values = np.append(np.linspace(0, 1, 100), 1e6)
    assert fence(values) == (0, 1)
    low, high, is_log = limits(values, may_be_log=False)
    assert (low, high, is_log) == (0, pytest.approx(1.06), False)


def test_axis_is_logarithmic_only_for_a_wide_range() -> None:
    assert limits(np.array([1000.0, 30.0, 3.0]), may_be_log=True)[2]
    assert not limits(np.array([1000.0, 30.0, 3.0]), may_be_log=False)[2]
    assert not limits(np.array([10.0, 3.0]), may_be_log=True)[2]
    assert not limits(np.array([1000.0, 0.0]), may_be_log=True)[2]


def test_labels_do_not_overlap_and_otherwise_do_not_move() -> None:
    assert spread_labels([0.1, 0.5, 0.9], gap=0.1, low=0, high=1) == pytest.approx([0.1, 0.5, 0.9])
    assert spread_labels([0.5, 0.5, 0.9], gap=0.1, low=0, high=1) == pytest.approx([0.45, 0.55, 0.9])
    assert spread_labels([0.0, 0.0, 0.0], gap=0.1, low=0, high=1) == pytest.approx([0.0, 0.1, 0.2])
    assert spread_labels([1.0, 1.0], gap=0.1, low=0, high=1) == pytest.approx([0.9, 1.0])
