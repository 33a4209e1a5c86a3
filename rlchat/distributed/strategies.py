"""Extensions of Lightning's Trainer: the strategy ``fsdp2``, atomic checkpoints, and a check of the strategy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry

from rlchat.distributed.sharding import to_be_sharded
from rlchat.errors import UserError
from rlchat.utils.files import write_atomically

FSDP2 = "fsdp2"
_SHARDED_PRECISIONS = (
    "None",
    "32-true",
    "32",
    "bf16-mixed",
    "bf16",
    "bf16-true",
    "16-true",
)  # without a gradient scaler


class FSDP2Strategy(ModelParallelStrategy):
    """FSDP2 over all processes of all nodes: ``--trainer.strategy fsdp2``.

    Lightning's own defaults would shard over nodes only, use the devices of a node for tensor parallelism, and write a
    checkpoint as a folder. Networks are sharded by :func:`rlchat.distributed.sharding.shard_networks`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **kwargs)

    def setup_environment(self) -> None:
        """Sets the number of processes to shard over, which is only known here."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """The context ``trainer.init_module()``: a stage built in it has its weights on the first process only.

        With ``empty_init`` False, every process builds whole networks. Lightning's meta device is never used, because
        the weights have to come from somewhere.
        """
        with super().tensor_init_context(empty_init=False):
            if empty_init is False:
                yield
                return
            with to_be_sharded(first=self.global_rank == 0):
                yield


if FSDP2 not in StrategyRegistry:
    StrategyRegistry.register(FSDP2, FSDP2Strategy, description="shards every parameter over all processes")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes each checkpoint as one file, atomically.

    Lightning writes to the system's folder for temporary files and moves the file from there. On another file system
    the move is a copy, and a kill during the copy leaves half a checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes ``checkpoint`` to ``path``.

        Raises:
            UserError: it cannot be written; an existing file at ``path`` is unchanged.
            TypeError: ``storage_options`` is set, which local files do not support.
        """
        if storage_options is not None:
            raise TypeError("storage options are not supported: checkpoints are local files")
        write_atomically(Path(path), lambda file: torch.save(checkpoint, file))


def check_strategy(options: Mapping[str, Any]) -> None:
    """Raises :class:`UserError` if the Trainer's ``options`` have a strategy or precision that does not work."""
    name = _name(options)
    if name in ("fsdp", "fsdp_cpu_offload") or name.endswith(".FSDPStrategy"):
        raise UserError(
            f"trainer.strategy {name}: FSDP1 is not supported, because it cannot run heads outside of forward or take "
            f"optimizer steps by hand; use {FSDP2}"
        )
    if name.endswith(".ModelParallelStrategy"):
        raise UserError(f"trainer.strategy {name} is not supported; use {FSDP2}, which shards over all processes")
    precision = str(options.get("precision"))
    if is_fsdp2(options) and precision not in _SHARDED_PRECISIONS:
        # Each process would only see infinite gradients in its own shard, so processes would skip different steps.
        raise UserError(f"trainer.precision {precision} is not supported with {FSDP2}; use bf16-mixed or 32-true")


def is_fsdp2(options: Mapping[str, Any]) -> bool:
    """Whether the Trainer's ``options`` have the strategy :class:`FSDP2Strategy`."""
    name = _name(options)
    return name == FSDP2 or name.endswith(f".{FSDP2Strategy.__name__}")


def _name(options: Mapping[str, Any]) -> str:
    strategy = options.get("strategy")
    return strategy if isinstance(strategy, str) else str((strategy or {}).get("class_path", ""))
