"""Collective operations between processes, on values and on sharded tensors.

Under DDP every process holds every network. Under FSDP2 each process holds a part of every parameter (see
:mod:`rlchat.distributed.sharding`), and a forward pass gathers the parts from all processes. All processes must
therefore make the same forward passes in the same order. If one could stop earlier than another, they agree first
(:func:`anywhere`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlchat.errors import UserError

if TYPE_CHECKING:
    import lightning as L

T = TypeVar("T")


def global_sum(module: L.LightningModule, value: Tensor | float) -> Tensor:
    """``value`` summed over all processes, on the module's device and without a gradient. A collective."""
    total = torch.as_tensor(value, device=module.device).detach().clone()
    if module.trainer.world_size > 1:
        dist.all_reduce(total)
    return total


def anywhere(module: L.LightningModule, condition: bool | Tensor) -> bool:
    """Whether any element of ``condition`` is true on any process. A collective."""
    return bool(greatest(module, int(torch.as_tensor(condition).any())))


def greatest(module: L.LightningModule, value: int) -> int:
    """The maximum of ``value`` over all processes. A collective."""
    if module.trainer.world_size == 1:
        return value
    found = torch.tensor(value, device=module.device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)


def gather_objects(value: Any) -> list[Any]:
    """``value`` of every process, in the order of ranks. A collective."""
    if not _joined():
        return [value]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def raise_everywhere(module: L.LightningModule, error: Exception | None) -> None:
    """Raises ``error`` here, and a :class:`UserError` that quotes it on the processes without one. A collective.

    Without it, a process that fails alone leaves the others waiting in their next collective. Returns if no process has
    an error.
    """
    if not anywhere(module, error is not None):
        return
    texts = gather_objects(None if error is None else str(error))
    if error is not None:
        raise error
    rank, text = next((rank, text) for rank, text in enumerate(texts) if text is not None)
    raise UserError(f"process {rank} stopped, and this one with it: {text}")


def take_turns(parts: Sequence[Sequence[T]], block: int = 1) -> list[T]:
    """The rows of all processes, merged in blocks of ``block`` rows: the first block of each rank, then the second, ….

    ``parts`` holds each rank's rows. Example: ``take_turns([[1, 3], [2]])`` is ``[1, 2, 3]``, the order in which
    :class:`rlchat.data.batches.RankSampler` distributed them.
    """
    longest = max(map(len, parts))
    return [row for start in range(0, longest, block) for part in parts for row in part[start : start + block]]


def is_first() -> bool:
    """Whether this is the process that writes files: it has rank 0, or it is the only one."""
    return not _joined() or dist.get_rank() == 0


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


# ---- shards ----------------------------------------------------------------------------------------------------------


def is_sharded(network: nn.Module) -> bool:
    """Whether processes share the parameters of ``network``; see :mod:`rlchat.distributed.sharding`."""
    return any(hasattr(parameter, "full_tensor") for parameter in network.parameters())


def whole(tensor: Tensor) -> Tensor:
    """``tensor`` gathered from all processes if it is sharded (a collective), otherwise ``tensor`` itself."""
    full_tensor = getattr(tensor, "full_tensor", None)  # a method of DTensor, whose class is slow to import
    return tensor if full_tensor is None else full_tensor()


def whole_state(network: nn.Module, leave_out: Collection[str] = ()) -> dict[str, Tensor]:
    """The state dict of ``network`` on the CPU of the first process; empty on the others. A collective if sharded.

    The tensors whose names are in ``leave_out`` are not gathered.
    """
    state = {}
    for name, tensor in network.state_dict().items():
        if name in leave_out:
            continue
        gathered = whole(tensor)
        if is_first():
            state[name] = gathered.cpu()
    return state


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The 2-norm of the gradients of all ``parameters``. A collective if they are sharded."""
    return whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
