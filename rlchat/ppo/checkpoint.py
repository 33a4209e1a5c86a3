"""What a PPO checkpoint needs to be loaded by itself: the reward, and the model apart from its weights."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlchat.errors import UserError
from rlchat.models.file_content import FORMAT, VERSION
from rlchat.ppo.checks.gradients import GradientCheck
from rlchat.ppo.config import PPOConfig
from rlchat.ppo.held_out import HeldOutModule
from rlchat.ppo.losses import AdaptiveKL
from rlchat.ppo.state import restore_counters, saved_counters
from rlchat.rewards import Reward
from rlchat.rewards.described import describe_fully, rebuild
from rlchat.training.guard import LastGoodWeights
from rlchat.training.initial_model import base_options, open_policy

if TYPE_CHECKING:
    from typing_extensions import Self

    from rlchat.ppo.module import Iteration

_START_OPTIONS = ("base_model", "tiktoken_encoding", "init_from", "critic_init")


class ResumableModule(HeldOutModule):
    """The counters of PPO, and checkpoints that contain them.

    Args:
        options: the options of PPO, which name the policy to start from.
        reward: scores the responses.
    """

    def __init__(self, options: PPOConfig, reward: Reward) -> None:
        bundle = open_policy(*options.start, **base_options(options))
        options.check_length(bundle.max_length)
        super().__init__(bundle, options, reward)
        self.automatic_optimization = False
        self.kl_coef, target = options.kl_coef, options.kl_target
        self.adaptive_kl = None if target is None else AdaptiveKL(options.kl_coef, target, options.kl_horizon)
        self.iterations = self.episodes = 0
        self.good_weights = LastGoodWeights()
        self.last_iteration: Iteration | None = None
        self.gradient_check = GradientCheck()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the counters, the adaptive KL coefficient, the reward, and the model apart from its weights."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["rlchat"] |= saved_counters(self) | saved_origin(self)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, **options: Any) -> Self:  # type: ignore[override]
        """The module in a checkpoint, with its reward.

        The files that its run started from are only needed if it trained a part of the weights.

        Args:
            checkpoint_path: the checkpoint's file.
            options: those of Lightning's ``load_from_checkpoint``, and arguments of the module to change, such as
                ``reward``.

        Raises:
            UserError: if the reward cannot be rebuilt from the checkpoint, and no other is passed.
        """
        options = {"weights_only": True, **options, "_instantiator": None}  # made here, not by LightningCLI's function
        with options_to_load(checkpoint_path, options) as replaced:
            module = super().load_from_checkpoint(checkpoint_path, **replaced)
        restore_start_options(module, torch.load(checkpoint_path, "meta", weights_only=True)["hyper_parameters"])
        return module

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores them."""
        super().on_load_checkpoint(checkpoint)
        restore_counters(self, checkpoint["rlchat"])


def saved_origin(module: ResumableModule) -> dict[str, Any]:
    """The entries ``reward`` and ``model`` of a checkpoint's ``rlchat``.

    A checkpoint of a part of the weights has no ``model``: the frozen ones come from ``base_model`` or ``init_from``.
    """
    reward = {"reward": describe_fully(module.reward)}
    if not module.options.trained_part.is_everything:
        return reward
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
    return {**reward, "model": model}


@contextmanager
def options_to_load(path: str | Path, given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The arguments with which a PPOModule is made to load the checkpoint ``path``; ``given`` are the caller's own.

    The files that the run started from are not needed if the checkpoint has all weights: a temporary model file takes
    their place.

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


def restore_start_options(module: ResumableModule, saved: dict[str, Any]) -> None:
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
