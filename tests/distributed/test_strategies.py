"""What is plugged into the Trainer: checkpoints that neither a kill nor a full disk can halve, and which strategies."""

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


def test_a_kill_in_the_middle_of_writing_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    path = tmp_path / "run" / "last.ckpt"
    done = subprocess.run([sys.executable, "-c", SUICIDE, str(path)], env=ENVIRONMENT, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert [p.stat().st_size for p in path.parent.iterdir() if p != path] == [1_000_000]  # what it had written so far
    assert read(path)["count"] == 1


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    path, limits = tmp_path / "last.ckpt", resource.getrlimit(resource.RLIMIT_FSIZE)
    AtomicCheckpointIO().save_checkpoint({"count": 1, "weights": torch.ones(10_000)}, path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"last\.ckpt: cannot be written: File too large; what"):
            AtomicCheckpointIO().save_checkpoint({"count": 2, "weights": torch.ones(10_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read(path)["count"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_storage_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="storage options"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "last.ckpt", storage_options={"key": "x"})


def test_fsdp2_has_a_name() -> None:
    assert isinstance(StrategyRegistry.get("fsdp2"), FSDP2Strategy)


@pytest.mark.parametrize(
    "strategy", [None, "auto", "ddp", "fsdp2", {"class_path": "rlchat.distributed.strategies.FSDP2Strategy"}]
)
def test_strategies_that_train(strategy: Any) -> None:
    check_strategy({"strategy": strategy})


@pytest.mark.parametrize(
    ("strategy", "says"),
    [
        ("fsdp", "trainer.strategy fsdp: that is FSDP1"),
        ("fsdp_cpu_offload", "trainer.strategy fsdp_cpu_offload: that is FSDP1"),
        ({"class_path": "lightning.pytorch.strategies.FSDPStrategy"}, "that is FSDP1"),
        ({"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}, "use fsdp2, which is that with"),
    ],
    ids=str,
)
def test_strategies_that_cannot_be_had(strategy: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        check_strategy({"strategy": strategy})
