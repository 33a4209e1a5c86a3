"""Runs that train a part of the weights: what their networks are, and what their checkpoints contain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn

from rlchat.distributed.collectives import gather_objects
from rlchat.distributed.sharding import has_weights
from rlchat.errors import UserError
from rlchat.models.adapters import (
    add_adapter,
    announce_part,
    checkpoint_gradients,
    freeze,
    frozen_digest,
    frozen_names,
    share_frozen,
)
from rlchat.models.backbones import Backbone
from rlchat.models.networks import RLChatModel
from rlchat.training.options import StageOptions

# A checkpoint can only be resumed with the same values of these.
_FIXED = ("adapter", "lora_rank", "lora_alpha", "lora_targets", "train_layers", "optimizer")
_DEFAULTS: dict[str, Any] = {name: StageOptions.__dataclass_fields__[name].default for name in _FIXED}


def prepare_backbone(backbone: Backbone, options: StageOptions) -> None:
    """Freezes what ``options`` do not train, adds the adapter, and turns on gradient checkpointing."""
    if options.gradient_checkpointing:
        checkpoint_gradients(backbone)
    freeze(backbone, options.trained_part)
    add_adapter(backbone, options.trained_part)


class PartCheckpoint:
    """Keeps frozen weights out of the checkpoints of a run that trains a part of the weights.

    A resumed run makes them again from ``base_model`` or ``init_from``; a digest shows whether they are the same.

    Args:
        network: the network of the stage, prepared by :func:`prepare_backbone` and not yet sharded.
        options: the options of the stage.
    """

    def __init__(self, network: nn.Module, options: StageOptions) -> None:
        self._whole = options.trained_part.is_everything
        self._digest, self._compared = "", "the frozen weights"
        self.include(network)
        announce_part(network, options.trained_part)

    def include(self, network: nn.Module) -> None:
        """Adds the frozen weights of ``network``, such as a separate critic, to those that a checkpoint is checked for.

        A process without weights gets the digest from the first one, by :meth:`follow_first`.
        """
        if not self._whole and has_weights():
            self._digest += frozen_digest(network)

    def leave_out(self, reference: RLChatModel, policy: RLChatModel) -> None:
        """Keeps the frozen ``reference`` of ``policy`` out of checkpoints, also of a run that trains all weights.

        A resumed run makes it again, so a checkpoint is checked for the weights of its backbone. Its value head has no
        effect.
        """
        if self._whole:
            self._whole, self._compared = False, "the weights of the reference model"
        if not share_frozen(reference.backbone, policy.backbone):
            self.include(reference.backbone)

    def follow_first(self) -> None:
        """Takes over the digest of the first process. A collective."""
        self._digest = gather_objects(self._digest)[0]

    def on_save(self, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Removes the frozen weights of backbones and reference model from ``checkpoint``, and adds their digest."""
        if self._whole:
            return
        checkpoint["rlchat"]["frozen"] = self._digest
        # A WeightAveraging callback restores a complete model from the checkpoint.
        if not any(isinstance(callback, WeightAveraging) for callback in _callbacks(module)):
            omitted, state = omitted_weights(module), checkpoint["state_dict"]
            checkpoint["state_dict"] = {name: value for name, value in state.items() if name not in omitted}

    def on_load(self, module: L.LightningModule, checkpoint: Mapping[str, Any]) -> None:
        """Checks that ``checkpoint`` belongs to the same frozen weights and the same options.

        Raises:
            UserError: if it does not; the error names the option or the weight.
        """
        self._check_options(module, checkpoint.get("hyper_parameters", {}))
        state, own = checkpoint.get("state_dict", {}), module.state_dict()
        for name, value in own.items():
            if name in state and state[name].shape != value.shape:
                found, expected = tuple(state[name].shape), tuple(value.shape)
                raise UserError(
                    f"the checkpoint's weight {name} has shape {found}, expected {expected}; leave out --config to use "
                    f"the configuration of the checkpoint, or train a new model"
                )
        if self._whole:
            return
        if checkpoint.get("rlchat", {}).get("frozen") != self._digest:
            raise UserError(
                f"{self._compared} differ from those that the checkpoint was trained with; pass the same base_model "
                f"or init_from, and the same seed_everything if the base model has random weights"
            )
        omitted = omitted_weights(module)
        for name in own:
            if name not in state and name not in omitted:
                raise UserError(f"the checkpoint lacks the weight {name}; use a checkpoint of the same model")

    def _check_options(self, module: L.LightningModule, saved: Mapping[str, Any]) -> None:
        for name, default in _DEFAULTS.items():
            before, now = saved.get(name, default), module.hparams.get(name, default)
            unused = name.startswith("lora_") and module.hparams.get("adapter") is None  # adapter is checked first
            if before != now and not unused:
                raise UserError(
                    f"the checkpoint was trained with {name} {_shown(before)}, not {_shown(now)}; set "
                    f"--model.{name} {_shown(before)}, or start a new run with --model.init_from"
                )


def omitted_weights(module: L.LightningModule) -> set[str]:
    """The names of the frozen weights that a checkpoint does not contain. Small frozen heads are always saved."""
    return {name for name in frozen_names(module) if "backbone." in name or name.startswith("reference.")}


def _callbacks(module: L.LightningModule) -> list[L.Callback]:
    return list(getattr(getattr(module, "_trainer", None), "callbacks", []))


def _shown(value: object) -> str:
    return "null" if value is None else str(value)
