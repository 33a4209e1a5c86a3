"""The recipes `reasoning/sft` and `reasoning/ppo` in a short form: from questions with answers to pass@k."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path

import pytest
from helpers.command_line import rlchat

SHORT = ["--data.batch_size=8", "--data.val_batch_size=16", "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]


def write_questions(path: Path) -> None:
    """Questions like those of `rlchat data reasoning-gym spell_backward --responses`."""
    rows = []
    for letters in itertools.permutations("abcdefg", 3):
        word = "".join(letters)
        question, answer = f"Spell this word backward (example: sun -> nus): {word}", word[::-1]
        rows.append({"prompt": question, "answer": answer, "check": "exact", "response": answer})
    path.parent.mkdir()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_sft_then_ppo_and_pass_at_k(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_questions(workplace / "data" / "spelling.jsonl")
    rlchat("tokenizer", "train", "data/spelling.jsonl", "--vocab-size", "256", "-o", "data/bytes.tiktoken")
    rlchat("fit", "--config", "reasoning/sft", *SHORT)
    rlchat("fit", "--config", "reasoning/ppo", *SHORT)
    (metrics,) = Path("lightning_logs/ppo").glob("*/metrics.csv")
    with metrics.open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/reward"]]
    assert len(rows) == 2
    for row in rows:
        parts = float(row["reward/verified"]) + float(row["reward/partial_credit"])
        assert float(row["train/reward"]) == pytest.approx(parts, abs=1e-6)
    capsys.readouterr()
    rlchat("test", "--config", "reasoning/ppo", "--ckpt_path", "best", "--best_of", "2")
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("pass@1", "pass@2", "answer_accuracy_greedy"))
