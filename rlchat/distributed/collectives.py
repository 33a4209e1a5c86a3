"""One process or many, one result: what they tell each other, and networks that they hold in shards.

Under DDP every process holds every network. Under FSDP2 (Zhao et al. 2023, arXiv 2304.11277; ``fully_shard`` of
PyTorch) each holds a part of every matrix, and all of them meet in every forward pass to put it together: so all have
to make the same passes in the same order, and wherever one process could stop earlier than another they ask each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    import lightning as L
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")


def global_sum(module: L.LightningModule, value: Tensor | float) -> Tensor:
    """``value`` summed over all processes, on the module's device and without a gradient."""
    total = torch.as_tensor(value, device=module.device).detach().clone()
    if module.trainer.world_size > 1:
        dist.all_reduce(total)
    return total


def anywhere(module: L.LightningModule, condition: bool | Tensor) -> bool:
    """Whether ``condition`` holds on any process; one of several values holds where any of them does."""
    return bool(greatest(module, int(torch.as_tensor(condition).any())))


def greatest(module: L.LightningModule, value: int) -> int:
    """The greatest ``value`` of any process."""
    if module.trainer.world_size == 1:
        return value
    found = torch.tensor(value, device=module.device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)


def gather_objects(value: Any) -> list[Any]:
    """``value`` of every process, in their order."""
    if not _joined():
        return [value]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def take_turns(parts: Sequence[Sequence[T]], block: int = 1) -> list[T]:
    """The rows of all processes in global order: process after process gives its next ``block``, as they were dealt."""
    longest = max(map(len, parts))
    return [row for start in range(0, longest, block) for part in parts for row in part[start : start + block]]


def is_first() -> bool:
    """Whether this is the process that writes files: the first, or the only one."""
    return not _joined() or dist.get_rank() == 0


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


# ---- shards ----------------------------------------------------------------------------------------------------------


def shard_networks(module: L.LightningModule) -> None:
    """Shards each network of ``module`` where its strategy is FSDP2, once; does nothing under any other.

    Each is sharded for itself, so that they can be run in any order. For ``LightningModule.configure_model``.
    """
    if module.device_mesh is None:
        return
    for network in module.children():
        if any(True for _ in network.parameters()) and not is_sharded(network):
            shard(network, module.device_mesh["data_parallel"])


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Leaves each process of ``mesh`` its part of every parameter, and puts them together where they are used.

    The blocks of a ``ModuleList`` are put together one by one. What is left (embeddings, heads) stays together from
    the network's forward pass to the end of its backward pass, so that heads may be called on what forward returned:
    registering them as forward methods of their own would reduce the gradients of the embeddings before they are there.
    """
    from torch.distributed.fsdp import fully_shard  # slow to import, and a chat has no use for it

    for blocks in [part for part in network.modules() if isinstance(part, nn.ModuleList)]:
        for block in blocks:
            fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh, reshard_after_forward=False)


def is_sharded(network: nn.Module) -> bool:
    """Whether :func:`shard` had ``network``."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(network, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """``tensor`` with the parts of all processes: a collective where it is sharded, itself where it is not."""
    full_tensor = getattr(tensor, "full_tensor", None)  # of a DTensor, whose class is slow to import
    return tensor if full_tensor is None else full_tensor()


def whole_state(network: nn.Module) -> dict[str, Tensor]:
    """The state of ``network`` on the CPU, whole on every process; a collective where it is sharded."""
    return {name: whole(tensor).cpu() for name, tensor in network.state_dict().items()}


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all gradients of ``parameters`` together; a collective where they are sharded."""
    return whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
