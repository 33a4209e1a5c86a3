"""What a PPO checkpoint needs to be loaded by itself: the reward, and the model apart from its weights."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlchat.errors import UserError
from rlchat.models.model_file import FORMAT, VERSION
from rlchat.rewards.described import describe_fully, rebuild

if TYPE_CHECKING:
    from rlchat.ppo.module import PPOModule

_START_OPTIONS = ("base_model", "tiktoken_encoding", "init_from", "critic_init")


def saved_origin(module: PPOModule) -> dict[str, Any]:
    """The entries ``reward`` and ``model`` of a checkpoint's ``rlchat``."""
    tokenizer = module.tokenizer.state()
    tokenizer["ranks"] = torch.frombuffer(bytearray(tokenizer["ranks"]), dtype=torch.uint8)
    model = {
        "backbone": module.model.backbone.config_json(),
        "hidden_dim": module.model.hidden_dim,
        "tokenizer": tokenizer,
        "max_length": module.max_length,
    }
    if module.critic is not None:
        model["critic"] = {"backbone": module.critic.backbone.config_json(), "hidden_dim": module.critic.hidden_dim}
    return {"reward": describe_fully(module.reward), "model": model}


@contextmanager
def options_to_load(path: str | Path, given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The arguments with which a PPOModule is made to load the checkpoint ``path``; ``given`` are the caller's own.

    The files that the run started from are not needed, because the checkpoint has the weights: a temporary model file
    takes their place.

    Raises:
        UserError: if the reward is not in the checkpoint or cannot be rebuilt, and none is given.
    """
    content = torch.load(path, map_location="cpu", weights_only=True)
    saved = content.get("rlchat", {})
    options = dict(given)
    if options.get("reward") is None:
        if "reward" not in saved:
            raise UserError(f"{path}: the checkpoint does not describe its reward; pass reward=")
        try:
            options["reward"] = rebuild(saved["reward"])
        except UserError as error:
            raise UserError(f"{path}: {error}; pass reward=") from error
    if "model" not in saved or any(name in given for name in _START_OPTIONS):
        yield options
        return
    with tempfile.TemporaryDirectory(prefix="rlchat-") as folder:
        file = Path(folder, "model.pt")
        torch.save(_model_file(saved["model"], content["state_dict"]), file)
        yield {**options, **dict.fromkeys(_START_OPTIONS), "init_from": str(file)}


def restore_start_options(module: PPOModule, saved: dict[str, Any]) -> None:
    """Sets the options that :func:`options_to_load` replaced to those in the hyper-parameters ``saved``."""
    for name in _START_OPTIONS:
        if name in saved:
            module.hparams[name] = saved[name]
            setattr(module.options, name, saved[name])


def _model_file(model: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    content = {**model, "format": FORMAT, "version": VERSION, "kind": "policy", "about": {}}
    content["state"] = _under("model.", state)
    if "critic" in model:
        content["critic"] = {**model["critic"], "state": _under("critic.", state)}
    return content


def _under(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
