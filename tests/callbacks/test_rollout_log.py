"""Rollouts on disk and in TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.small_ppo import QUESTIONS, LetterE, fit, ppo
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlchat.callbacks.rollout_log import RolloutLog
from rlchat.conversation import Conversation
from rlchat.errors import UserError
from rlchat.rewards import MissingEnd, Reply, ReplyFactor, Reward


def test_every_few_iterations_as_lines_and_as_histograms(encoding: str, tmp_path: Path) -> None:
    module = ppo(encoding, reward=Reward([LetterE(), MissingEnd(0.5)]))
    board = TensorBoardLogger(str(tmp_path), name="", version="run")
    rows = fit(module, 5, callbacks=[RolloutLog(every_n_iterations=2)], logger=[board, CSVLogger(tmp_path, "", "run")])
    lines = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1] * 8 + [3] * 8 + [5] * 8
    for iteration in (1, 3, 5):
        part = [line for line in lines if line["iteration"] == iteration]
        logged = rows[iteration - 1]
        assert [line["prompt"][-1]["content"] for line in part] == list(QUESTIONS)
        assert sum(line["reward"] for line in part) / 8 == pytest.approx(logged["train/reward"], abs=1e-5)
        assert sum(line["kl"] for line in part) / 8 == pytest.approx(logged["train/kl"], abs=1e-5)
        cut = sum(line["ended_by"] == "token limit" for line in part)
        assert cut / 8 == pytest.approx(logged["train/truncated_fraction"])
        for line in part:
            assert line["reward"] == pytest.approx(sum(line["factors"].values()))
            assert set(line["factors"]) == {"letter_e", "missing_end"}
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"histograms": 0})
    events.Reload()
    names = {f"rollout/{name}" for name in ("reward", "kl", "value", "tokens", "advantage")}
    assert names <= set(events.Tags()["histograms"])
    assert {"rollout/factor_letter_e", "rollout/factor_missing_end"} <= set(events.Tags()["histograms"])
    found = events.Histograms("rollout/reward")
    assert [event.step for event in found] == [1, 3, 5]
    assert found[0].histogram_value.num == 8


def test_at_most_max_replies_are_written(encoding: str, tmp_path: Path) -> None:
    fit(ppo(encoding), 1, callbacks=[RolloutLog(max_replies=3)], logger=CSVLogger(tmp_path, "", "run"))
    assert len((tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()) == 3


def test_fast_dev_run_leaves_no_files(encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fit(ppo(encoding), 1, callbacks=[RolloutLog()], fast_dev_run=True)
    assert not list(tmp_path.rglob("rollouts.jsonl"))


class Enormous(ReplyFactor):
    """A reward far outside the bins of TensorBoard's histograms."""

    def score(self, prompt: Conversation, reply: Reply) -> float:
        return 1e21


def test_an_enormous_reward_does_not_stop_the_run(encoding: str, tmp_path: Path) -> None:
    board = TensorBoardLogger(str(tmp_path), name="", version="run")
    # Without a critic, whose loss would overflow: all rewards are equal, so that the advantages are 0.
    module = ppo(encoding, reward=Reward([Enormous()]), advantage="rloo", group_size=2)
    fit(module, 1, callbacks=[RolloutLog()], logger=board)
    (line, *_) = (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()
    assert json.loads(line)["reward"] == pytest.approx(1e21)
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"histograms": 0})
    events.Reload()
    assert events.Histograms("rollout/reward")[0].histogram_value.num == 16


@pytest.mark.parametrize("option", ["every_n_iterations", "max_replies"])
def test_invalid_options_are_errors(option: str) -> None:
    with pytest.raises(UserError, match=rf"^invalid value 0 for RolloutLog\.{option}: expected a positive integer$"):
        RolloutLog(**{option: 0})
