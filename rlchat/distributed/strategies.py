"""What rlchat plugs into Lightning's Trainer: the strategy ``fsdp2``, and checkpoints that nothing can halve."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry

from rlchat.errors import UserError
from rlchat.utils.files import write_atomically

FSDP2 = "fsdp2"


class FSDP2Strategy(ModelParallelStrategy):
    """FSDP2 over all processes of all nodes: ``--trainer.strategy fsdp2``.

    Lightning's own would by default shard over nodes alone and take the devices of each for tensor parallelism, and
    would write a folder for a checkpoint. The networks shard themselves; see
    :func:`rlchat.distributed.collectives.shard_networks`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **kwargs)

    def setup_environment(self) -> None:
        """By now it is known how many processes there are."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


if FSDP2 not in StrategyRegistry:
    StrategyRegistry.register(FSDP2, FSDP2Strategy, description="every process holds a part of every parameter")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints in one file each, written whole or not at all.

    Lightning's own is first made in memory, then written to the system's folder for temporary files and moved from
    there: on another file system that is a copy, and a kill in the middle of it leaves half a checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes ``checkpoint``. Raises :class:`UserError` where that cannot be; the one before is then unharmed."""
        if storage_options is not None:
            raise TypeError("a checkpoint is a file on a disk, to which no storage options apply")
        write_atomically(Path(path), lambda file: torch.save(checkpoint, file))


def check_strategy(options: Mapping[str, Any]) -> None:
    """Raises :class:`UserError` where ``trainer.strategy`` names one in which rlchat cannot train."""
    strategy = options.get("strategy")
    name = strategy if isinstance(strategy, str) else str((strategy or {}).get("class_path", ""))
    if name in ("fsdp", "fsdp_cpu_offload") or name.endswith(".FSDPStrategy"):
        raise UserError(
            f"trainer.strategy {name}: that is FSDP1, which cannot do what rlchat does with a model (optimizer steps "
            f"by hand, heads on their own); use {FSDP2}"
        )
    if name.endswith(".ModelParallelStrategy"):
        raise UserError(f"trainer.strategy {name}: use {FSDP2}, which is that with every process holding a part")
