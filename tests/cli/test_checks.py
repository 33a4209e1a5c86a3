"""`rlchat fit --checks strict`: a broken invariant ends the run, which can be resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.command_line import rlchat, write_talk

from rlchat.__main__ import main

FAULT = """
import pathlib
import lightning as L
import torch

class ChangesTheReference(L.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 1 and pathlib.Path("faulty").exists():
            with torch.no_grad():
                next(module.reference.parameters()).add_(1.0)
"""
WORDS = ["fit", "--config", "smoke", "--data.path", "talk.jsonl", "--data.batch_size", "2"]


def test_a_strict_run_stops_and_can_be_resumed(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_talk(workplace / "talk.jsonl")
    (workplace / "fault.py").write_text(FAULT)
    (workplace / "faulty").touch()
    assert main([*WORDS, "--trainer.callbacks+=fault.ChangesTheReference", "--checks", "strict"]) == 2
    error = capsys.readouterr().err
    assert "rlchat: iteration 2: the weights of the reference model have changed" in error
    assert "Traceback" not in error
    checkpoint = Path("lightning_logs/ppo/version_0/checkpoints/last.ckpt")
    assert torch.load(checkpoint, weights_only=True)["rlchat"]["iterations"] == 2
    (alarm,) = map(json.loads, Path("lightning_logs/ppo/version_0/alarms.jsonl").read_text().splitlines())
    assert (alarm["iteration"], alarm["what"]) == (2, "frozen reference")
    (workplace / "faulty").unlink()  # the fix
    rlchat("fit", "--ckpt_path", "last")
    assert json.loads(Path("lightning_logs/ppo/version_1/alarms.jsonl").read_text()) == alarm
    resumed = Path("lightning_logs/ppo/version_1/checkpoints/last.ckpt")
    assert torch.load(resumed, weights_only=True)["rlchat"]["iterations"] == 4
