"""Model files: one `.pt` file with everything that is needed to chat with a model or to score with it.

It contains tensors and plain values, and is loaded with ``weights_only=True``, without a network or other files.

An adapter file is an exception: a model file with the adapter alone. It refers to the weights that the adapter belongs
to, its base, and is loaded by merging the adapter into them.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor, nn

from rlchat.distributed.collectives import is_first
from rlchat.errors import UserError, one_line
from rlchat.models.adapters import (
    Adapter,
    alpha_of,
    copy_sharing_frozen,
    merge_into,
    merged_state,
    put_on,
    share_frozen,
    state_without_base,
)
from rlchat.models.backbones import Backbone
from rlchat.models.base.weights import BaseWeights, open_base_model
from rlchat.models.base_models import config_from_json, weights_digest
from rlchat.models.file_content import (
    ADAPTER_TYPES,
    ADAPTER_VERSION,
    FORMAT,
    TYPES,
    VERSION,
    check_types,
    read_content,
    shown,
    stored_tokenizer,
)
from rlchat.models.networks import Critic, RewardModel, RLChatModel
from rlchat.models.probe import check_cache_is_used
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer
from rlchat.utils.files import write_atomically

_log = logging.getLogger("rlchat")

_HOW = "--base-model, or base_model in a configuration"
_LONGEST_CHAIN = 8  # adapters that belong to adapters: SFT, then PPO, then PPO again, …
_LARGEST_BUFFERS = 2**30  # bytes of tensors that a backbone computes from its configuration, for example causal masks
M = TypeVar("M", bound=nn.Module)


@dataclass(slots=True)
class PolicyBundle:
    """A chat model with its tokenizer. ``about`` describes its origin in plain values.

    ``critic`` is set if PPO trained a separate critic; otherwise the model's value head estimates values. ``base`` is
    where the weights of the backbone are from, apart from an adapter; None if they are nowhere but here.
    """

    model: RLChatModel
    tokenizer: ChatTokenizer
    max_length: int
    about: dict[str, Any] = field(default_factory=dict)
    critic: Critic | None = None
    base: BaseWeights | None = None


@dataclass(slots=True)
class RewardBundle:
    """A reward model with its tokenizer. ``base`` is as in :class:`PolicyBundle`."""

    model: RewardModel
    tokenizer: ChatTokenizer
    max_length: int
    about: dict[str, Any] = field(default_factory=dict)
    base: BaseWeights | None = None


def identity(bundle: PolicyBundle) -> str:
    """The id of a chat model: equal for all copies of its file, and for the versions that `rlchat learn` makes of it.

    It is a digest of the weights in the file. A version records the id of the model that it was learned from. Empty for
    a model that was not loaded from a file.
    """
    return _inherited(bundle.about) or ("" if bundle.base is None else bundle.base.fingerprint[:20])


def stored_identity(path: str | Path, weights: bool = False) -> tuple[str, str]:
    """The :func:`identity` of the chat model in ``path`` and a digest of its own weights, without its base.

    The digest begins with the identity, except for a version, which has the identity of its original model. Without
    ``weights``, the file is mapped, only a sample of its weights is read, and NaN among them is not noticed.

    Raises:
        UserError: the file is missing, damaged, or holds another kind of model.
    """
    content = read_content(path, "policy", weights)
    digest = _backbone_digest(content)
    if content["version"] == ADAPTER_VERSION and (base := BaseWeights.from_values(content["base"])) is not None:
        digest = _adapter_digest(base.fingerprint, content, digest)
    return _inherited(content["about"]) or digest[:20], digest


def _inherited(about: dict[str, Any]) -> str:
    learned = about.get("learned")
    model_id = learned.get("model_id") if isinstance(learned, dict) else None
    return model_id if isinstance(model_id, str) else ""


def _backbone_digest(content: dict[str, Any]) -> str:
    return weights_digest((name, weight) for name, weight in content["state"].items() if name.startswith("backbone."))


def _adapter_digest(base: str, content: dict[str, Any], digest: str) -> str:
    return hashlib.sha256(f"{base} {content['alpha']} {digest}".encode()).hexdigest()


def save_bundle(path: str | Path, bundle: PolicyBundle | RewardBundle, merge_adapter: bool = True) -> None:
    """Writes ``bundle`` atomically: after a kill or on a full disk the previous file is still there.

    Without ``merge_adapter``, the file contains the adapter, the heads and ``bundle.base``, which must be set. A
    critic with other frozen weights than the policy's is written with all its weights.

    Every process must call it, because each may hold a shard of the model; the first one writes.
    """
    model = bundle.model
    critic = bundle.critic if isinstance(bundle, PolicyBundle) else None
    part = _part(model, merge_adapter)
    critic_part = None
    if critic is not None:
        critic_part = _part(critic, merge_adapter or not share_frozen(critic.backbone, model.backbone))
    if not is_first():
        return
    tokenizer = bundle.tokenizer.state()
    tokenizer["ranks"] = torch.frombuffer(bytearray(tokenizer["ranks"]), dtype=torch.uint8)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "kind": "policy" if isinstance(bundle, PolicyBundle) else "reward",
        "tokenizer": tokenizer,
        "max_length": bundle.max_length,
        "about": bundle.about,
        **part,
    }
    if not merge_adapter:
        assert bundle.base is not None
        content |= {"version": ADAPTER_VERSION, "base": bundle.base.values()}
    if critic_part is not None:
        content["critic"] = critic_part
    write_atomically(Path(path), lambda file: torch.save(content, file))


def _part(network: RLChatModel | RewardModel | Critic, merge_adapter: bool) -> dict[str, Any]:
    """What a file contains of one network. A collective if it is sharded."""
    hidden_dim = 0 if isinstance(network, RewardModel) else network.hidden_dim
    if merge_adapter:
        backbone = network.backbone.config_json()
        return {"backbone": backbone, "hidden_dim": hidden_dim, "state": merged_state(network)}
    return {"hidden_dim": hidden_dim, "alpha": alpha_of(network.backbone), "state": state_without_base(network)}


def load_policy(
    path: str | Path,
    device: str | torch.device = "cpu",
    base_model: str | None = None,
    *,
    weights: bool = True,
    chain: int = 0,
) -> PolicyBundle:
    """The chat model in ``path``, in eval mode.

    Args:
        path: the model file.
        device: of the model.
        base_model: where the base of an adapter file is now; by default its own path, then the folder of ``path``.
        weights: whether to read and check the weights. Without them, the model only has the shape, and ``device`` is
            not used; for this, call it in :func:`rlchat.distributed.sharding.weights_on_first`.
        chain: the number of adapter files that lead to ``path``.

    Raises:
        UserError: the file is missing, damaged, or holds another kind of model, or its base is missing or another one.
    """
    content = read_content(path, "policy", weights)
    tokenizer = stored_tokenizer(content, path)
    trunk, base = _base(path, content, tokenizer, base_model, weights, chain)
    part = content.get("critic")
    critic = None if part is None else _critic(path, part, trunk, weights).eval()

    def build(backbone: Backbone) -> RLChatModel:
        return new_policy(backbone, tokenizer, content["hidden_dim"])

    model = _load(path, content, trunk, build, weights).eval()
    if weights:
        check_cache_is_used(model.backbone)
        model, critic = model.to(device), critic and critic.to(device)
    return PolicyBundle(model, tokenizer, content["max_length"], content["about"], critic, base)


def _critic(path: str | Path, part: Any, trunk: Backbone | None, weights: bool) -> Critic:
    """The separate critic in a file. Its adapter, if it has one, belongs to the same base as the policy's."""
    if not isinstance(part, dict):
        raise UserError(f"{path}: damaged model file, critic is {shown(part)}, expected dict")
    whole = "backbone" in part or trunk is None
    types = TYPES if whole else ADAPTER_TYPES
    names = ("backbone" if whole else "alpha", "hidden_dim", "state")
    check_types(part, {name: types[name] for name in names}, path, weights)
    base = None if whole else copy.deepcopy(trunk)
    return _load(path, part, base, lambda backbone: Critic(backbone, part["hidden_dim"]), weights)


def load_reward_model(
    path: str | Path, device: str | torch.device = "cpu", base_model: str | None = None, *, weights: bool = True
) -> RewardBundle:
    """The reward model in ``path``, in eval mode; the arguments are those of :func:`load_policy`.

    Reward models and critics run without a KV cache, so only :func:`load_policy` checks that the cache is used.

    Raises:
        UserError: the file is missing, damaged, or holds another kind of model, or its base is missing or another one.
    """
    content = read_content(path, "reward", weights)
    tokenizer = stored_tokenizer(content, path)
    trunk, base = _base(path, content, tokenizer, base_model, weights)
    model = _load(path, content, trunk, RewardModel, weights).eval()
    if weights:
        model = model.to(device)
    return RewardBundle(model, tokenizer, content["max_length"], content["about"], base)


def load_reward_adapter(path: str | Path, policy: PolicyBundle) -> RewardBundle | None:
    """The reward model in ``path`` on the frozen weights of ``policy``, in the same memory; None if that cannot be.

    It can if the file contains an adapter, and both have the same base and tokenizer. The backbone of ``policy`` must
    be frozen and have no adapter yet. The reward model has its own adapter beside the shared weights.

    Raises:
        UserError: the file is missing, damaged, or holds another kind of model, or peft is not installed.
    """
    content = read_content(path, "reward")
    base = BaseWeights.from_values(content.get("base"))
    if base is None or policy.base is None or base.fingerprint != policy.base.fingerprint:
        return None
    tokenizer = stored_tokenizer(content, path)
    if tokenizer.fingerprint != policy.tokenizer.fingerprint:
        return None
    backbone = copy_sharing_frozen(policy.model.backbone)
    model = _load(path, content, backbone, RewardModel, add=put_on).requires_grad_(False)
    return RewardBundle(model.eval(), tokenizer, content["max_length"], content["about"])


def _base(
    path: str | Path,
    content: dict[str, Any],
    tokenizer: ChatTokenizer,
    base_model: str | None,
    weights: bool,
    chain: int = 0,
) -> tuple[Backbone | None, BaseWeights]:
    """The backbone that the adapter in ``content`` belongs to, and ``path`` itself as the base of other adapters.

    The backbone is None if the file contains a whole model. Without ``weights`` it only has the shape, and whether it
    is the right one is left to the process that reads the weights.
    """
    digest = _backbone_digest(content) if weights else ""
    if content["version"] != ADAPTER_VERSION:
        if base_model is not None:
            raise UserError(
                f"{path}: the model file contains all weights and no adapter, so it needs no base model; leave out "
                f"{base_model}"
            )
        return None, BaseWeights("init_from", str(path), digest)
    base = BaseWeights.from_values(content["base"])
    if base is None:
        raise UserError(f"{path}: damaged model file, its base is not described; create it again")
    if chain >= _LONGEST_CHAIN:
        raise UserError(f"{path}: the adapter belongs to an adapter, and so on for {chain} files; merge one of them")
    place = base_model or base.place(Path(path))
    if place is None:
        raise UserError(
            f"{path} contains an adapter, and {base} that it belongs to was not found; put it at that path or beside "
            f"{path}, or pass its new path ({_HOW})"
        )
    _log.info("%s is an adapter for %s, which is loaded from %s", path, base, place)
    try:
        if base.kind == "init_from":
            bundle = load_policy(place, weights=weights, chain=chain + 1)
            assert bundle.base is not None
            trunk, found = bundle.model.backbone, bundle.base.fingerprint
        else:
            trunk = open_base_model(place, tokenizer, content["max_length"], weights=weights)
            found = trunk.fingerprint
    except UserError as error:
        if chain:  # the sentence begins with the file that the user named
            raise
        raise UserError(
            f"{path} contains an adapter for {base}, which cannot be loaded from {place}: {error}; if the base has "
            f"moved, pass its new path ({_HOW})"
        ) from error
    if weights and found != base.fingerprint:
        raise UserError(
            f"{path} contains an adapter for another base than {place}: it belongs to {base} with the fingerprint "
            f"{base.fingerprint[:12]}, got {found[:12]}; pass the path of the base that it was trained on ({_HOW})"
        )
    return trunk, BaseWeights("init_from", str(path), _adapter_digest(found, content, digest))


def new_policy(backbone: Backbone, tokenizer: ChatTokenizer, hidden_dim: int = 0) -> RLChatModel:
    """A policy over ``backbone`` that can generate the ids for which ``tokenizer`` has text, and the end marker."""
    return RLChatModel(backbone, tokenizer.unsayable_ids, hidden_dim)


def _load(
    path: str | Path,
    part: dict[str, Any],
    trunk: Backbone | None,
    build: Callable[[Backbone], M],
    weights: bool = True,
    add: Callable[[Backbone, Adapter], None] = merge_into,
) -> M:
    """``build(backbone)`` with the weights of ``part``, or with ``trunk`` and the adapter and heads of ``part``.

    ``add`` adds the adapter to ``trunk``. Without ``weights``, everything is only checked, and no weights are set.

    The model is first built without memory (on the device ``meta``) and compared with the weights: the shape in a
    small damaged file may need any amount of memory.
    """
    state = part["state"]
    shape = part["backbone"] if trunk is None else trunk.config_json()
    try:
        config = config_from_json(shape)
        if trunk is None and int(getattr(config, "num_hidden_layers", 0)) > len(state):
            raise UserError(f"{path}: damaged model file, {config.num_hidden_layers} layers but {len(state)} weights")
        with torch.device("meta"):
            empty = build(Backbone.from_config_json(shape))
    except UserError as error:
        raise error if str(error).startswith(str(path)) else UserError(f"{path}: {error}") from error
    except KeyError as error:
        raise UserError(
            f"{path}: transformers {transformers.__version__} does not have the model family {error}; the file was "
            f"probably made with a newer version, update transformers"
        ) from error
    except Exception as error:  # damaged values can cause any error
        raise UserError(f"{path}: damaged model file, its model cannot be built: {one_line(error)}") from error
    if trunk is not None:
        adapter, heads = _checked_adapter(path, part, trunk, empty)
        if weights:
            add(trunk, adapter)
        model = build(trunk)
        if weights:
            model.load_state_dict(heads, strict=False)
        return model
    _check_weights(path, empty, state, empty.state_dict().keys())
    others = sum(b.numel() * b.element_size() for name, b in empty.named_buffers() if name not in state)
    if others > _LARGEST_BUFFERS:
        raise UserError(f"{path}: damaged model file, its configuration asks for {others:,} bytes of buffers")
    model = build(Backbone.from_config_json(shape))
    if weights:
        model.load_state_dict(state)
    return model


def _checked_adapter(
    path: str | Path, part: dict[str, Any], trunk: Backbone, empty: nn.Module
) -> tuple[Adapter, dict[str, Tensor]]:
    """The adapter and the heads in ``part``. Raises :class:`UserError` if they do not fit ``trunk`` and ``empty``."""
    matrices, heads = {}, {}
    for name, weight in part["state"].items():
        if ".lora_" in name:
            matrices[name.removeprefix("backbone.")] = weight
        else:
            heads[name] = weight
    _check_weights(path, empty, heads, [name for name in empty.state_dict() if not name.startswith("backbone.")])
    adapter = Adapter(part["alpha"], matrices)
    try:
        adapter.check(trunk)
    except ValueError as error:
        raise UserError(f"{path}: damaged model file, {error}") from error
    return adapter, heads


def _check_weights(path: str | Path, empty: nn.Module, state: dict[str, Tensor], expected: Collection[str]) -> None:
    """Raises :class:`UserError` unless ``state`` has the ``expected`` weights in the shapes of ``empty``."""
    for name in sorted(set(expected) ^ state.keys()):
        which = "lacks" if name in expected else "has the unexpected"
        raise UserError(f"{path}: damaged model file, it {which} weight {name}")
    shapes = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    for name in state:
        if shapes[name] != (found := tuple(state[name].shape)):
            raise UserError(f"{path}: damaged model file, weight {name} has shape {found}, expected {shapes[name]}")
