"""Atomic checkpoints, and the check of strategies and precisions."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import StrategyRegistry

from rlchat.distributed.strategies import AtomicCheckpointIO, FSDP2Strategy, check_strategy
from rlchat.errors import UserError

# Kills itself when a third of a checkpoint is written.
SUICIDE = """
import os, signal, sys, torch
from rlchat.distributed.strategies import AtomicCheckpointIO
AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(1_000_000), "count": 1}, sys.argv[1])
def half(content, file):
    file.write(b"x" * 1_000_000)
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = half
AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(1_000_000), "count": 2}, sys.argv[1])
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def read(path: Path) -> dict[str, Any]:
    return AtomicCheckpointIO().load_checkpoint(path, weights_only=True)


@pytest.mark.slow
def test_a_kill_while_writing_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "run" / "last.ckpt"
    done = subprocess.run([sys.executable, "-c", SUICIDE, str(path)], env=ENVIRONMENT, timeout=900)
    assert done.returncode == -signal.SIGKILL
    assert [p.stat().st_size for p in path.parent.iterdir() if p != path] == [
        1_000_000
    ]  # the unfinished temporary file
    assert read(path)["count"] == 1


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    path, limits = tmp_path / "last.ckpt", resource.getrlimit(resource.RLIMIT_FSIZE)
    AtomicCheckpointIO().save_checkpoint({"count": 1, "weights": torch.ones(10_000)}, path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(
            UserError, match=r"last\.ckpt: cannot be written: File too large; the existing file is unchanged"
        ):
            AtomicCheckpointIO().save_checkpoint({"count": 2, "weights": torch.ones(10_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read(path)["count"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_storage_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="storage options"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "last.ckpt", storage_options={"key": "x"})


def test_fsdp2_is_registered() -> None:
    assert isinstance(StrategyRegistry.get("fsdp2"), FSDP2Strategy)


@pytest.mark.parametrize(
    "strategy", [None, "auto", "ddp", "fsdp2", {"class_path": "rlchat.distributed.strategies.FSDP2Strategy"}]
)
def test_strategies_that_train(strategy: Any) -> None:
    check_strategy({"strategy": strategy})


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("fsdp", "trainer.strategy fsdp: FSDP1 is not supported"),
        ("fsdp_cpu_offload", "trainer.strategy fsdp_cpu_offload: FSDP1 is not supported"),
        ({"class_path": "lightning.pytorch.strategies.FSDPStrategy"}, "FSDPStrategy: FSDP1 is not supported"),
        (
            {"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"},
            "use fsdp2, which shards over all processes",
        ),
    ],
    ids=str,
)
def test_strategies_that_are_not_supported(strategy: Any, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        check_strategy({"strategy": strategy})


@pytest.mark.parametrize("precision", ["16-mixed", 16, "16"])
@pytest.mark.parametrize("strategy", ["fsdp2", {"class_path": "rlchat.distributed.strategies.FSDP2Strategy"}])
def test_fsdp2_with_a_gradient_scaler_is_refused(strategy: Any, precision: Any) -> None:
    expected = f"trainer.precision {precision} is not supported with fsdp2; use bf16-mixed or 32-true"
    with pytest.raises(UserError, match=expected):
        check_strategy({"strategy": strategy, "precision": precision})
    check_strategy({"strategy": "ddp", "precision": precision})
    check_strategy({"strategy": strategy, "precision": "bf16-mixed"})
