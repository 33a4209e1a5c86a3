"""The model bundle: one `.pt` file with all that it takes to talk to a model, or to score with it.

A bundle holds tensors and plain values, loads with ``weights_only=True``, and needs no network and no other file.
"""

from __future__ import annotations

import pickle
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from rlchat.distributed.collectives import is_first, whole_state
from rlchat.errors import UserError
from rlchat.models.backbones import Backbone
from rlchat.models.networks import Critic, RewardModel, RLChatModel
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer
from rlchat.utils.files import write_atomically

FORMAT = "rlchat-bundle"
VERSION = 1
Kind = Literal["policy", "reward"]
_NAMES = {"policy": "a chat model", "reward": "a reward model"}
_KEYS = {"kind", "backbone", "hidden_dim", "tokenizer", "max_length", "about", "state"}


@dataclass(slots=True)
class PolicyBundle:
    """A chat model with its tokenizer. ``about`` tells where it came from: plain values.

    ``critic`` estimates values where PPO trained a network of its own for that; a shared one is the model's value head.
    """

    model: RLChatModel
    tokenizer: ChatTokenizer
    max_length: int
    about: dict[str, Any] = field(default_factory=dict)
    critic: Critic | None = None


@dataclass(slots=True)
class RewardBundle:
    """A reward model with its tokenizer."""

    model: RewardModel
    tokenizer: ChatTokenizer
    max_length: int
    about: dict[str, Any] = field(default_factory=dict)


def save_bundle(path: str | Path, bundle: PolicyBundle | RewardBundle) -> None:
    """Writes ``bundle``, atomically: a kill or a full disk in the middle leaves what was there before.

    Every process calls it, for each may hold a part of the model; the first one writes.
    """
    state = whole_state(bundle.model)
    critic = bundle.critic if isinstance(bundle, PolicyBundle) else None
    critic_state = None if critic is None else whole_state(critic)
    if not is_first():
        return
    tokenizer = bundle.tokenizer.state()
    tokenizer["ranks"] = torch.frombuffer(bytearray(tokenizer["ranks"]), dtype=torch.uint8)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "kind": "policy" if isinstance(bundle, PolicyBundle) else "reward",
        "backbone": bundle.model.backbone.config_json(),
        "hidden_dim": bundle.model.hidden_dim if isinstance(bundle.model, RLChatModel) else 0,
        "tokenizer": tokenizer,
        "max_length": bundle.max_length,
        "about": bundle.about,
        "state": state,
    }
    if critic is not None:
        content["critic"] = {
            "backbone": critic.backbone.config_json(),
            "hidden_dim": critic.hidden_dim,
            "state": critic_state,
        }
    write_atomically(Path(path), lambda file: torch.save(content, file))


def load_policy(path: str | Path, device: str | torch.device = "cpu") -> PolicyBundle:
    """The chat model in ``path``, in eval mode. Raises :class:`UserError` for a file that is missing or is none."""
    content = _read(path, "policy")
    tokenizer = _tokenizer(content)
    model = new_policy(Backbone.from_config_json(content["backbone"]), tokenizer, content["hidden_dim"])
    _fill(model, content, path)
    critic: Critic | None = None
    if (part := content.get("critic")) is not None:
        critic = Critic(Backbone.from_config_json(part["backbone"]), part["hidden_dim"])
        _fill(critic, part, path)
        critic = critic.to(device).eval()
    return PolicyBundle(model.to(device).eval(), tokenizer, content["max_length"], content["about"], critic)


def load_reward_model(path: str | Path, device: str | torch.device = "cpu") -> RewardBundle:
    """The reward model in ``path``, in eval mode. Raises :class:`UserError` for a file that is missing or is none."""
    content = _read(path, "reward")
    model = RewardModel(Backbone.from_config_json(content["backbone"]))
    _fill(model, content, path)
    return RewardBundle(model.to(device).eval(), _tokenizer(content), content["max_length"], content["about"])


def new_policy(backbone: Backbone, tokenizer: ChatTokenizer, hidden_dim: int = 0) -> RLChatModel:
    """A policy over ``backbone`` that can say what ``tokenizer`` has text for."""
    return RLChatModel(backbone, tokenizer.unsayable_ids, hidden_dim)


def _read(path: str | Path, kind: Kind) -> dict[str, Any]:
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such model; train one with `rlchat demo` or `rlchat fit`, or give its path")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's, about pickles of other programs
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: holds something other than tensors and plain values, or is damaged; it was not opened"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: damaged, or no bundle of rlchat; make it again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: not a bundle of rlchat; bundles are what `rlchat fit` leaves in checkpoints/*.pt")
    if content.get("version") != VERSION:
        found = content.get("version")
        raise UserError(f"{path}: a bundle of version {found}, this rlchat reads {VERSION}; update rlchat")
    if _KEYS - content.keys() or content["kind"] not in _NAMES:
        raise UserError(f"{path}: a bundle of which parts are missing; make it again")
    if content["kind"] != kind:
        raise UserError(f"{path}: the bundle of {_NAMES[content['kind']]}, where that of {_NAMES[kind]} is needed")
    return content


def _tokenizer(content: dict[str, Any]) -> ChatTokenizer:
    state = dict(content["tokenizer"])
    state["ranks"] = state["ranks"].numpy().tobytes()
    return ChatTokenizer.from_state(state)


def _fill(model: torch.nn.Module, content: dict[str, Any], path: str | Path) -> None:
    try:
        model.load_state_dict(content["state"])
    except RuntimeError as error:
        raise UserError(
            f"{path}: its weights do not fit the shape that it names; it is damaged, make it again"
        ) from error
