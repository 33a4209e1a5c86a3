"""The selection of the best model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rlchat.callbacks.selection import REWARD_MINUS_KL, Selection, selection_of
from rlchat.errors import UserError

PPO = SimpleNamespace(monitor=("val/reward", "max"), options=SimpleNamespace(kl_coef=0.05))


def metrics(**values: float) -> dict[str, torch.Tensor]:
    return {f"val/{name}": torch.tensor(value) for name, value in values.items()}


def test_by_default_the_modules_monitor() -> None:
    selection = selection_of(None, None, PPO)
    assert selection == Selection("val/reward", "max")
    assert selection.score(metrics(reward=0.5)) == 0.5
    assert selection.score(metrics(accuracy=0.5)) is None


def test_a_module_without_a_monitor_selects_nothing() -> None:
    assert selection_of(None, None, SimpleNamespace()) is None


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("val/answer_accuracy", "max"),
        ("val/reward_polite", "max"),
        ("val/perplexity", "min"),
        ("val/pair_loss", "min"),
        ("val/kl", "min"),
        ("val/truncated_fraction", "min"),
    ],
)
def test_a_named_metric_and_its_direction(name: str, mode: str) -> None:
    selection = selection_of(name, None, PPO)
    assert selection is not None
    assert (selection.metric, selection.mode) == (name, mode)


def test_reward_minus_kl() -> None:
    """0.9 − 0.05 · 12 = 0.3 and 0.9 − 0.01 · 12 = 0.78."""
    for weight, expected in ((None, 0.3), (0.01, 0.78)):
        selection = selection_of(REWARD_MINUS_KL, weight, PPO)
        assert selection is not None
        assert float(selection.score(metrics(reward=0.9, kl=12.0)) or 0) == pytest.approx(expected)


def test_an_absent_metric_is_an_error_that_lists_the_present_ones() -> None:
    selection = selection_of("val/acuracy", None, PPO)
    assert selection is not None
    with pytest.raises(UserError, match="select_by val/acuracy: this stage does not log val/acuracy; it logs val/kl"):
        selection.score(metrics(reward=0.9, kl=12.0))
    with pytest.raises(UserError, match="it logs no validation metric"):
        selection.score({})
