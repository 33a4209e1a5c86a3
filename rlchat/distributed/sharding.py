"""Sharding of networks over processes, and how networks are built so that only the first process holds whole weights.

Under FSDP2 (Zhao et al. 2023, arXiv 2304.11277; ``fully_shard`` of PyTorch), each process trains with a part of every
parameter. A process that first built whole networks would need host memory for all of them. Stages that are built in
:func:`to_be_sharded` therefore load their weights on the first process only. The parameters of the other processes are
on the device ``meta``, which stores shapes and no values. :func:`shard_networks` then sends each process its shards,
one parameter at a time. Buffers (rotary tables, masks) are small and depend on the configuration only, so every process
computes them as always.

The command line does this with ``--trainer.strategy fsdp2``; a script builds the stage in ``trainer.init_module()``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rlchat.distributed.collectives import is_first, is_sharded

if TYPE_CHECKING:
    import lightning as L
    from torch.distributed.device_mesh import DeviceMesh

# Whether this process is the first of those that will hold shards; None outside of `to_be_sharded`. A context variable,
# because the stage is built by LightningCLI or in `trainer.init_module()`, which pass nothing to it.
_FIRST: ContextVar[bool | None] = ContextVar("first", default=None)


# ---- building --------------------------------------------------------------------------------------------------------


@contextmanager
def to_be_sharded(first: bool) -> Iterator[None]:
    """A context in which stages build networks that will be sharded; with weights if this is the ``first`` process.

    ``first`` may be True on more processes than the first one: their weights are replaced by those of the first.
    """
    token = _FIRST.set(first)
    try:
        yield
    finally:
        _FIRST.reset(token)


def will_be_sharded() -> bool:
    """Whether the stage that is being built will be sharded before it is used."""
    return _FIRST.get() is not None


def has_weights() -> bool:
    """Whether the networks of the stage that is being built have weights on this process."""
    return _FIRST.get() is not False


@contextmanager
def weights_on_first() -> Iterator[bool]:
    """A context to build networks in; yields :func:`has_weights`. Without weights, all parameters are on ``meta``."""
    if has_weights():
        yield True
        return
    hook: Any = _on_meta  # PyTorch declares that it returns nothing
    with torch.nn.modules.module.register_module_parameter_registration_hook(hook):
        yield False


def _on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    if parameter is None or parameter.is_meta:  # the same object, because parameters may be tied
        return parameter
    return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)


# ---- sharding --------------------------------------------------------------------------------------------------------


def shard_networks(module: L.LightningModule, from_first: bool = False) -> None:
    """Shards each network of ``module`` under the strategy ``fsdp2``; does nothing if they are sharded already.

    Networks are sharded separately, so that they can run in any order. ``LightningModule.configure_model`` calls this.
    If ``module`` was built in :func:`to_be_sharded`, pass ``from_first``: all weights are those of the first process.
    """
    if module.device_mesh is None:
        return
    networks = [part for part in module.children() if any(True for _ in part.parameters()) and not is_sharded(part)]
    weights: list[dict[str, Any]] = [{} for _ in networks]
    if from_first and is_first():
        # Networks may have the same parameters, which would move to the device as a whole with the first of them.
        weights = [dict(network.state_dict()) for network in networks]
        for network in networks:
            _discard_weights(network)
    for network, whole in zip(networks, weights, strict=True):
        shard(network, module.device_mesh["data_parallel"])
        if from_first:
            _fill(network, whole)


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Shards every parameter of ``network`` over the processes of ``mesh``; a forward pass gathers them.

    Each block of a ``ModuleList`` is gathered when it runs, and freed afterwards. The other parameters (embeddings,
    heads) stay gathered from the network's forward pass to the end of its backward pass, so that heads can be called on
    the hidden states that forward returned. If heads were registered as separate forward methods, FSDP2 would reduce
    the gradients of the embeddings before they are complete.
    """
    from torch.distributed.fsdp import fully_shard  # slow to import, and not needed for chat

    for blocks in [part for part in network.modules() if isinstance(part, nn.ModuleList)]:
        for block in blocks:
            fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh, reshard_after_forward=False)


def _discard_weights(network: nn.Module) -> None:
    """Moves the parameters of ``network`` to the device ``meta``; tied parameters stay tied, buffers stay."""
    empty: dict[nn.Parameter, nn.Parameter | None] = {}
    for part in network.modules():
        for name, parameter in list(part.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter not in empty:
                empty[parameter] = _on_meta(part, name, parameter)
            setattr(part, name, empty[parameter])


def _fill(network: nn.Module, weights: dict[str, Any]) -> None:
    """Sends the first process's ``weights``, the state dict before sharding, to the shards of ``network``."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict  # slow to import

    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(network, weights, options=options)
