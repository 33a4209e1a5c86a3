"""The command line in this process, with small data and models."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from matplotlib.figure import Figure

from rlchat.__main__ import main
from rlchat.demo.corpus import write_demo_corpus

WIDTH, HEADS = 16, 2
SHAPE = {
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
}
# A tiny model that trains quickly, instead of the recipe's.
TINY = ["--model.base_model", json.dumps(SHAPE), "--model.tiktoken_encoding", "rlchat_1k", "--model.max_length", "64"]
# Two batches and one validation of a recipe.
BRIEF = [
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=2",
    "--trainer.val_check_interval=1.0",
    "--trainer.log_every_n_steps=1",
    "--data.batch_size=4",
    "--data.val_batch_size=8",
]


def rlchat(*words: str, plot: bool = False) -> None:
    """Runs a command that must succeed; without ``plot``, its plot is empty."""
    with contextlib.nullcontext() if plot else empty_plots():
        assert main(words) == 0, words


def empty_plots() -> AbstractContextManager[Any]:
    """Plots without panels: drawing these takes longer than most runs of the tests."""
    return mock.patch("rlchat.callbacks.stats_plot.draw_stats", return_value=Figure((1, 1)))


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """``folder`` as the working directory of commands in this process; what they change in the process is undone."""
    log, threads, show = logging.getLogger("rlchat"), torch.get_num_threads(), warnings.formatwarning
    level = log.level
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", [*sys.path])
        patch.setenv("COLUMNS", "120")
        yield
    log.setLevel(level)
    torch.set_num_threads(threads)
    warnings.formatwarning = show


def write_talk(path: Path, count: int = 12) -> Path:
    """``count`` conversations with different first messages, so that each is a tree."""
    rows = [
        {"messages": [{"content": f"What comes after {n}?"}, {"content": f"It is {n + 1}."}], "quality": 0.9}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train_bundles(folder: Path) -> None:
    """``data/demo.jsonl`` and, as the demo's stages 1 and 2 leave them in ``checkpoints``, two tiny models.

    Call it with ``folder`` as the working directory.
    """
    (folder / "data").mkdir()
    write_demo_corpus(folder / "data" / "demo.jsonl", trees=30, seed=0)
    rlchat("fit", "--config", "demo/sft", *TINY, *BRIEF)
    rlchat("fit", "--config", "demo/reward", *BRIEF)
