"""Model files: one `.pt` file with everything that is needed to chat with a model or to score with it.

It contains tensors and plain values, and is loaded with ``weights_only=True``, without a network or other files.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import transformers
from torch import Tensor

from rlchat.distributed.collectives import is_first
from rlchat.errors import UserError, one_line
from rlchat.models.adapters import merged_state
from rlchat.models.backbones import Backbone
from rlchat.models.base_models import config_from_json
from rlchat.models.networks import Critic, RewardModel, RLChatModel
from rlchat.models.probe import check_cache_is_used
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer
from rlchat.utils.files import write_atomically

FORMAT = "rlchat-bundle"
VERSION = 2  # 1 has rlchat's own markers only, and no bias, scale or soft cap of logits
_READABLE = (1, 2)
Kind = Literal["policy", "reward"]
_NAMES = {"policy": "a chat model", "reward": "a reward model"}
_TYPES: dict[str, type] = {
    "kind": str,
    "backbone": str,
    "hidden_dim": int,
    "tokenizer": dict,
    "max_length": int,
    "about": dict,
    "state": dict,
}
_LARGEST_BUFFERS = 2**30  # bytes of tensors that a backbone computes from its configuration, for example causal masks
M = TypeVar("M", bound=torch.nn.Module)


@dataclass(slots=True)
class PolicyBundle:
    """A chat model with its tokenizer. ``about`` describes its origin in plain values.

    ``critic`` is set if PPO trained a separate critic; otherwise the model's value head estimates values.
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
    """Writes ``bundle`` atomically: after a kill or on a full disk the previous file is still there.

    Every process must call it, because each may hold a shard of the model; the first one writes.
    """
    state = merged_state(bundle.model)
    critic = bundle.critic if isinstance(bundle, PolicyBundle) else None
    critic_state = None if critic is None else merged_state(critic)
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


def load_policy(path: str | Path, device: str | torch.device = "cpu", weights: bool = True) -> PolicyBundle:
    """The chat model in ``path``, in eval mode.

    Without ``weights`` it only has the shape: the file's weights are neither read nor checked, and ``device`` is not
    used. For this, call it in :func:`rlchat.distributed.sharding.weights_on_first`.

    Raises:
        UserError: the file is missing, damaged, or holds another kind of model.
    """
    content = _read(path, "policy", weights)
    tokenizer = _tokenizer(content, path)
    model = _load(path, content, lambda part: new_policy(_backbone(part), tokenizer, part["hidden_dim"]), weights)
    critic: Critic | None = None
    if (part := content.get("critic")) is not None:
        if not isinstance(part, dict):
            raise UserError(f"{path}: damaged model file, critic is {_shown(part)}, expected dict")
        _check_types(part, {name: _TYPES[name] for name in ("backbone", "hidden_dim", "state")}, path, weights)
        critic = _load(path, part, lambda part: Critic(_backbone(part), part["hidden_dim"]), weights).eval()
    if weights:
        check_cache_is_used(model.backbone)
        model, critic = model.to(device), critic and critic.to(device)
    return PolicyBundle(model.eval(), tokenizer, content["max_length"], content["about"], critic)


def load_reward_model(path: str | Path, device: str | torch.device = "cpu", weights: bool = True) -> RewardBundle:
    """The reward model in ``path``, in eval mode; ``weights`` as in :func:`load_policy`.

    Reward models and critics run without a KV cache, so only :func:`load_policy` checks that the cache is used.

    Raises:
        UserError: the file is missing, damaged, or holds another kind of model.
    """
    content = _read(path, "reward", weights)
    tokenizer = _tokenizer(content, path)
    model = _load(path, content, lambda part: RewardModel(_backbone(part)), weights)
    if weights:
        model = model.to(device)
    return RewardBundle(model.eval(), tokenizer, content["max_length"], content["about"])


def new_policy(backbone: Backbone, tokenizer: ChatTokenizer, hidden_dim: int = 0) -> RLChatModel:
    """A policy over ``backbone`` that can generate the ids for which ``tokenizer`` has text, and the end marker."""
    return RLChatModel(backbone, tokenizer.unsayable_ids, hidden_dim)


def _read(path: str | Path, kind: Kind, weights: bool) -> dict[str, Any]:
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such model file; train one with `rlchat demo` or `rlchat fit`, or fix the path")
    _check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # from torch, about pickles of other programs
            # A tensor of a mapped file takes no memory until its values are read.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=not weights)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: contains something other than tensors and plain values, or is damaged; it was not loaded"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        raise UserError(f"{path}: damaged, or not an rlchat model file; create it again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: not an rlchat model file; `rlchat fit` writes them to checkpoints/*.pt")
    if content.get("version") not in _READABLE:
        found = content.get("version")
        raise UserError(f"{path}: unsupported model file version {found}, expected 1 or {VERSION}; update rlchat")
    if missing := sorted(_TYPES.keys() - content.keys()):
        raise UserError(f"{path}: incomplete model file, {', '.join(missing)} missing; create it again")
    _check_types(content, _TYPES, path, weights)
    if content["kind"] not in _NAMES:
        raise UserError(f"{path}: unknown kind of model {content['kind']!r}; update rlchat or create the file again")
    if content["kind"] != kind:
        raise UserError(f"{path}: contains {_NAMES[content['kind']]}, expected {_NAMES[kind]}")
    return content


def _check_archive(path: Path) -> None:
    """torch.save does not compress; a compressed archive could need any amount of memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return  # torch.load reports the problem
    if size > path.stat().st_size:
        raise UserError(f"{path}: expands to {size:,} bytes, more than the size of the file; not an rlchat model file")


def _check_types(content: dict[str, Any], types: dict[str, type], path: str | Path, weights: bool) -> None:
    for name, expected in types.items():
        value = content.get(name)
        if not isinstance(value, expected) or isinstance(value, bool) or (isinstance(value, int) and value < 0):
            raise UserError(f"{path}: damaged model file, {name} is {_shown(value)}, expected {expected.__name__}")
    for name, tensor in content["state"].items():
        if not isinstance(tensor, Tensor):
            raise UserError(f"{path}: damaged model file, weight {name} is {_shown(tensor)}, expected a tensor")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise UserError(f"{path}: damaged model file, weight {name} is larger than its stored data")
        if weights and not _is_finite(tensor):
            raise UserError(f"{path}: weight {name} has NaN or infinite values; training diverged, use another file")


def _is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite. The sum is fast to compute, and finite only if all values are."""
    if tensor.numel() == 0 or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, int | float | bool | None) else f"a {type(value).__name__}"


def _tokenizer(content: dict[str, Any], path: str | Path) -> ChatTokenizer:
    try:
        state = dict(content["tokenizer"])
        state["ranks"] = state["ranks"].numpy().tobytes()
        if not isinstance(state["name"], str):
            raise TypeError(f"its name is {_shown(state['name'])}, expected str")
        return ChatTokenizer.from_state(state)
    except UserError:
        raise
    except Exception as error:  # tiktoken raises many types of errors
        raise UserError(f"{path}: damaged model file, its tokenizer cannot be built: {one_line(error)}") from error


def _backbone(part: dict[str, Any]) -> Backbone:
    return Backbone.from_config_json(part["backbone"])


def _load(path: str | Path, part: dict[str, Any], build: Callable[[dict[str, Any]], M], weights: bool) -> M:
    """``build(part)`` with the weights of ``part``, if ``weights`` is set.

    The model is first built without memory (on the device ``meta``) and compared with the weights: the shape in a
    small damaged file may need any amount of memory.
    """
    state = part["state"]
    try:
        config = config_from_json(part["backbone"])
        if int(getattr(config, "num_hidden_layers", 0)) > len(state):
            raise UserError(f"{path}: damaged model file, {config.num_hidden_layers} layers but {len(state)} weights")
        with torch.device("meta"):
            empty = build(part)
    except UserError as error:
        raise error if str(error).startswith(str(path)) else UserError(f"{path}: {error}") from error
    except KeyError as error:
        raise UserError(
            f"{path}: transformers {transformers.__version__} does not have the model family {error}; the file was "
            f"probably made with a newer version, update transformers"
        ) from error
    except Exception as error:  # damaged values can cause any error
        raise UserError(f"{path}: damaged model file, its model cannot be built: {one_line(error)}") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    for name in sorted(shapes.keys() ^ state.keys()):
        which = "lacks" if name in shapes else "has the unexpected"
        raise UserError(f"{path}: damaged model file, it {which} weight {name}")
    for name, shape in shapes.items():
        if shape != (found := tuple(state[name].shape)):
            raise UserError(f"{path}: damaged model file, weight {name} has shape {found}, expected {shape}")
    others = sum(buffer.numel() * buffer.element_size() for name, buffer in empty.named_buffers() if name not in shapes)
    if others > _LARGEST_BUFFERS:
        raise UserError(f"{path}: damaged model file, its configuration asks for {others:,} bytes of buffers")
    model = build(part)
    if weights:
        model.load_state_dict(state)
    return model
