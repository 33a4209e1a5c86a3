"""Stages whose networks can be sharded: with FSDP2, their weights are on the first process until they are sharded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L

from rlchat.distributed.sharding import shard_networks, will_be_sharded
from rlchat.errors import UserError
from rlchat.models.backbones import Backbone
from rlchat.training.parts import PartCheckpoint, omitted_weights


class ShardableModule(L.LightningModule):
    """A LightningModule whose networks are sharded under FSDP2; see :mod:`rlchat.distributed.sharding`.

    If it is built in ``trainer.init_module()`` of such a trainer, it cannot be used before this trainer has sharded it:
    only the first process has weights, and there the reference model and the critic may share memory with the policy.
    """

    partly: PartCheckpoint

    def __init__(self) -> None:
        super().__init__()
        self.to_be_sharded = will_be_sharded()
        """Whether the networks have to be sharded before they are used."""

    def configure_model(self) -> None:
        """Shards the networks if the strategy is FSDP2. A collective.

        Raises:
            UserError: the module was built to be sharded, and the strategy is another.
        """
        if self.to_be_sharded and self.device_mesh is None:
            raise UserError(
                "this module was built in trainer.init_module() with the strategy fsdp2, and is used with another; use "
                "it with the same trainer, or build it outside of init_module()"
            )
        shard_networks(self, from_first=self.to_be_sharded)
        if self.to_be_sharded:
            self.partly.follow_first()
            for backbone in (module for module in self.modules() if isinstance(module, Backbone)):
                backbone.follow_first()
        self.to_be_sharded = False

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in PyTorch, but frozen weights that checkpoints do not contain are not reported as missing.

        Raises:
            UserError: the module is not sharded yet, although it was built to be.
        """
        if self.to_be_sharded:
            raise UserError(
                "weights cannot be loaded into a module that was built in trainer.init_module() with the strategy "
                "fsdp2; pass ckpt_path to the trainer, or load it outside of init_module()"
            )
        found = super().load_state_dict(state_dict, strict, assign)
        if found.missing_keys:
            omitted = omitted_weights(self)
            found.missing_keys[:] = [name for name in found.missing_keys if name not in omitted]
        return found
