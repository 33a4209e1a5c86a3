"""Training a part of a backbone: LoRA adapters (Hu et al. 2021, arXiv 2106.09685) or its last layers.

All other weights are frozen. Networks that start from the same backbone (policy, reference model, critic) then share
the frozen weights in memory: see :func:`copy_sharing_frozen`.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from rlchat.distributed.collectives import is_first, whole_state
from rlchat.distributed.sharding import will_be_sharded
from rlchat.errors import UserError
from rlchat.models.backbones import Backbone
from rlchat.models.base_models import weights_digest
from rlchat.utils.imports import install_command

_log = logging.getLogger("rlchat")

AdapterKind = Literal["lora"]
_NAME = "default"  # peft's name of a model's only adapter
_MATRICES = ("lora_A", "lora_B")
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class TrainedPart:
    """Which weights of a backbone are trained; by default all of them.

    Args:
        adapter: lora: low-rank matrices beside the linear layers are trained, and the backbone's weights are frozen.
        rank: the rank of these matrices.
        alpha: the output of an adapter is scaled by alpha / rank.
        targets: the linear layers that get an adapter, by the last part of their name; None: all.
        dropout: the dropout probability at the input of the adapters.
        layers: the number of last layers that are trained (or that get adapters); None: all.
    """

    adapter: AdapterKind | None = None
    rank: int = 16
    alpha: float = 32.0
    targets: Sequence[str] | None = None
    dropout: float = 0.0
    layers: int | None = None

    @property
    def is_everything(self) -> bool:
        """Whether no weight is frozen."""
        return self.adapter is None and self.layers is None


@dataclass(frozen=True)
class Adapter:
    """A trained LoRA adapter without the backbone that it belongs to.

    Attributes:
        alpha: the output of a layer's adapter is scaled by alpha / rank.
        matrices: ``NAME.lora_A.weight`` [rank, inputs] and ``NAME.lora_B.weight`` [outputs, rank] of each adapted
            linear layer, whose name is that within the backbone.
    """

    alpha: float
    matrices: Mapping[str, Tensor]

    def layers(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, A and B of each adapted layer."""
        for key, down in self.matrices.items():
            name, found, _ = key.rpartition(".lora_A.")
            if found:
                yield name, down, self.matrices[f"{name}.lora_B.weight"]

    @property
    def rank(self) -> int:
        """The number of rows of A, which is the same in all layers."""
        down = next(matrix for key, matrix in self.matrices.items() if ".lora_A." in key)
        return down.shape[0] if down.dim() else 0

    def check(self, backbone: Backbone) -> None:
        """Raises ValueError, which names what is wrong, unless the adapter fits linear layers of ``backbone``."""
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha is {self.alpha}, expected a positive number")
        if not any(".lora_A." in key for key in self.matrices):
            raise ValueError("it has no adapter")
        if odd := [key for key in self.matrices if not (key.startswith("transformer.") and key.endswith(".weight"))]:
            raise ValueError(f"it has the unexpected weight {odd[0]}")
        sides = {key.removesuffix(".weight").rpartition(".")[::2] for key in self.matrices}
        modules = dict(backbone.named_modules())
        for name in sorted({name for name, _ in sides}):
            layer = modules.get(name)
            if not isinstance(layer, nn.Linear | Conv1D) or any((name, side) not in sides for side in _MATRICES):
                raise ValueError(f"the adapter of {name} does not belong to a linear layer, or is incomplete")
            down, up = (self.matrices[f"{name}.{side}.weight"] for side in _MATRICES)
            outputs, inputs = reversed(layer.weight.shape) if isinstance(layer, Conv1D) else layer.weight.shape
            rank = self.rank
            if tuple(down.shape) != (rank, inputs) or tuple(up.shape) != (outputs, rank) or not rank:
                raise ValueError(
                    f"the adapter of {name} has the shapes {tuple(down.shape)} and {tuple(up.shape)}, expected (r, "
                    f"{inputs}), ({outputs}, r) with the same r in all layers"
                )


def freeze(backbone: Backbone, part: TrainedPart) -> None:
    """Freezes the weights of ``backbone`` that ``part`` does not train; the policy head is always among them.

    Raises:
        UserError: if ``part`` has more layers than the backbone.
    """
    if part.is_everything:
        return
    backbone.requires_grad_(False)
    trained = _last_layers(backbone, part.layers) if part.layers is not None else {}
    if part.adapter is None:
        for module in trained.values():
            module.requires_grad_(True)


def add_adapter(backbone: Backbone, part: TrainedPart) -> None:
    """Adds the adapter of ``part``, if it has one, to a frozen ``backbone``. It does not change any output yet.

    Raises:
        UserError: if peft is not installed, or the backbone does not have the layers.
    """
    if part.adapter is not None:
        _inject(backbone, _adapted_layers(backbone, part), part.rank, part.alpha, part.dropout)


@torch.no_grad()
def put_on(backbone: Backbone, adapter: Adapter) -> None:
    """Puts ``adapter`` beside the weights of a frozen ``backbone``, which do not change. It is not trained.

    Raises:
        UserError: if peft is not installed.
    """
    names = [name.removeprefix("transformer.") for name, _, _ in adapter.layers()]
    _inject(backbone, names, adapter.rank, adapter.alpha, dropout=0.0)
    backbone.requires_grad_(False)
    for name, down, up in adapter.layers():
        for side, matrix in zip(_MATRICES, (down, up), strict=True):
            backbone.get_parameter(f"{name}.{side}.{_NAME}.weight").copy_(matrix)


def _inject(backbone: Backbone, names: list[str], rank: int, alpha: float, dropout: float) -> None:
    """Adds new matrices to the linear layers ``names`` of the transformer."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError(f"--model.adapter lora requires peft: install it with {install_command('lora')}") from error
    modules = dict(backbone.transformer.named_modules())
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft accepts a float
        lora_dropout=dropout,
        target_modules=names,
        fan_in_fan_out=any(isinstance(modules[name], Conv1D) for name in names),
        bias="none",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about layers of both orientations, which peft handles
        inject_adapter_in_model(config, backbone.transformer, _NAME)


def copy_sharing_frozen(network: M) -> M:
    """A copy of ``network`` with the same frozen weights, in the same memory, and copies of the trained ones.

    If the networks will be sharded, the trained weights are in the same memory too: the shards will be copies.
    """
    shared = {id(p): p for p in network.parameters() if not p.requires_grad}
    if will_be_sharded():
        shared |= {id(p): nn.Parameter(p.detach()) for p in network.parameters() if p.requires_grad}
    return copy.deepcopy(network, {**shared})


def share_frozen(one: nn.Module, other: nn.Module) -> bool:
    """Whether all frozen weights of ``one`` are those of ``other``, in the same memory."""
    frozen = {id(p) for p in other.parameters() if not p.requires_grad}
    return all(id(p) in frozen for p in one.parameters() if not p.requires_grad)


def merged_state(network: nn.Module) -> dict[str, Tensor]:
    """The state dict of ``network`` on the CPU, with adapters merged into the weights. A collective if it is sharded.

    It is empty on all processes but the first. The names are those of the network without adapters. The network does
    not change.
    """
    state = whole_state(network)
    return dict(_merged(network, state)) if is_first() else state


def merged_weights(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and values of :func:`merged_state` one after the other, on the network's device, which is not sharded.

    Only the weights that an adapter changes are copies, and no more than one of them is made at a time.
    """
    return _merged(network, network.state_dict())


def _merged(network: nn.Module, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of ``state``, the state dict of ``network``, with adapters merged."""
    layers: dict[str, Any] = dict(network.named_modules())
    for key, value in state.items():
        name, found, parameter = key.rpartition(".base_layer.")
        if not found:
            if ".lora_" not in key:
                yield key, value
            continue
        if parameter == "weight":
            down, up = (state[f"{name}.{matrix}.{_NAME}.weight"] for matrix in _MATRICES)
            value = value + _delta(down, up, layers[name].scaling[_NAME], layers[name].fan_in_fan_out)
        yield f"{name}.{parameter}", value


def state_without_base(network: nn.Module) -> dict[str, Tensor]:
    """The state dict of ``network`` on the CPU without the weights under the adapter: its matrices, and all heads.

    The matrices have the names of :class:`Adapter`, after ``backbone.``. A collective if the network is sharded; empty
    on all processes but the first.
    """
    base = {name for name in network.state_dict() if name.startswith("backbone.") and ".lora_" not in name}
    return {name.replace(f".{_NAME}.", "."): value for name, value in whole_state(network, leave_out=base).items()}


def alpha_of(backbone: Backbone) -> float:
    """The alpha of the adapter of ``backbone``."""
    layers: Iterator[Any] = (layer for layer in backbone.modules() if hasattr(layer, "lora_alpha"))
    return float(next(layers).lora_alpha[_NAME])


@torch.no_grad()
def merge_into(backbone: Backbone, adapter: Adapter) -> None:
    """Adds ``adapter`` to the weights of ``backbone``, as :func:`merged_state` does. ``adapter.check`` comes first."""
    for name, down, up in adapter.layers():
        layer = backbone.get_submodule(name)
        assert isinstance(layer, nn.Linear | Conv1D)
        scaling = adapter.alpha / len(down)
        layer.weight += _delta(down.to(layer.weight), up.to(layer.weight), scaling, isinstance(layer, Conv1D))


def _delta(down: Tensor, up: Tensor, scaling: float, transposed: bool) -> Tensor:
    delta = scaling * (up @ down)
    return delta.T if transposed else delta


def frozen_names(network: nn.Module) -> set[str]:
    """The names in the state dict of the weights that are not trained."""
    named = network.named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if not parameter.requires_grad}


def frozen_digest(network: nn.Module) -> str:
    """A digest of the frozen weights of ``network``; see :func:`rlchat.models.base_models.weights_digest`."""
    return weights_digest((name, weight) for name, weight in network.named_parameters() if not weight.requires_grad)


def announce_part(network: nn.Module, part: TrainedPart) -> None:
    """Logs how many weights are trained, unless all of them are."""
    if not part.is_everything and is_first():
        sizes = [(p.numel(), p.requires_grad) for p in network.parameters()]
        trained, total = sum(n for n, on in sizes if on), sum(n for n, _ in sizes)
        _log.info("%s of %s weights are trained (%.2g %%)", f"{trained:,}", f"{total:,}", 100 * trained / total)


def frozen_layers(backbone: Backbone, part: TrainedPart) -> list[nn.Module]:
    """The layers below the first one that ``part`` trains, or to which it adds adapters; without layers, none."""
    return [] if part.layers is None else list(_layers(backbone)[1].values())[: -part.layers]


def checkpoint_gradients(backbone: Backbone) -> None:
    """Makes every layer compute its activations again in the backward pass instead of keeping them in memory."""
    for layer in _layers(backbone)[1].values():
        layer.forward = _Recomputed(layer)


class _Recomputed:
    """The forward method of ``layer``, whose activations are not kept.

    transformers recomputes activations in training mode only, and PPO trains in eval mode: dropout would change the
    policy. A class, not a closure, so that a copy of the layer runs the copy.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = type(self.layer).forward
        if not torch.is_grad_enabled():
            return forward(self.layer, *args, **kwargs)
        return checkpoint(forward, self.layer, *args, use_reentrant=False, **kwargs)


def _layers(backbone: Backbone) -> tuple[str, dict[str, nn.Module]]:
    """The name of the module that holds the layers, and the layers by name; both names within the transformer."""
    lists = [(name, m) for name, m in backbone.transformer.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        family = backbone.transformer.config.model_type
        raise UserError(f"the model family {family} has no list of layers; train all weights instead")
    name, layers = lists[0]  # the outermost, because modules come before their parts
    return name.rpartition(".")[0], {f"{name}.{number}": layer for number, layer in layers.named_children()}


def _last_layers(backbone: Backbone, count: int) -> dict[str, nn.Module]:
    """The last ``count`` layers, and the modules after them (a final norm), by their names within the transformer."""
    holder, layers = _layers(backbone)
    if not 1 <= count <= len(layers):
        raise UserError(
            f"invalid value {count} for train_layers: expected an integer from 1 to {len(layers)}, the number of "
            f"layers of the base model"
        )
    children = list(backbone.transformer.get_submodule(holder).named_children())
    place = next(i for i, (_, child) in enumerate(children) if next(iter(layers.values())) in child.children())
    after = {f"{holder}.{name}".lstrip("."): child for name, child in children[place + 1 :]}
    return {**dict(list(layers.items())[-count:]), **after}


def _adapted_layers(backbone: Backbone, part: TrainedPart) -> list[str]:
    """The full names of the linear layers that get an adapter.

    Raises:
        UserError: if there are none, or if ``targets`` has a name that no linear layer has.
    """
    linear = [n for n, m in backbone.transformer.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    if part.layers is not None:
        inside = tuple(f"{name}." for name in _last_layers(backbone, part.layers))
        linear = [name for name in linear if name.startswith(inside)]
    family = backbone.transformer.config.model_type
    if not linear:
        raise UserError(f"adapter lora: the base model ({family}) has no linear layers; train its last layers instead")
    known = sorted({_last(name) for name in linear})
    for target in part.targets or ():
        if target not in known:
            raise UserError(
                f"invalid value '{target}' for lora_targets: the linear layers of the base model ({family}) are "
                f"{', '.join(known)}"
            )
    return [name for name in linear if part.targets is None or _last(name) in part.targets]


def _last(name: str) -> str:
    return name.rpartition(".")[2]
