"""The output of the frozen layers, kept for a rollout, so that later forward passes start at the first trained layer.

With ``train_layers``, the embedding and the first layers are frozen, and PPO has no dropout: for the tokens of a
rollout, their output is the same in every epoch. Policy, reference model and a critic that starts from the policy
share these layers. The policy's first pass over a rollout records their output, and all later passes use it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rlchat.distributed.collectives import is_first
from rlchat.models.adapters import TrainedPart, frozen_layers
from rlchat.models.networks import Critic, RLChatModel
from rlchat.models.packing import Packing
from rlchat.models.probe import can_skip_layers

MAX_BYTES = 2**30
"""The states of a rollout are kept if they need at most 1 GiB."""

_log = logging.getLogger("rlchat")


@dataclass(slots=True)
class KeptStates:
    """The hidden states after the last frozen layer, for the tokens of a batch [B, T]."""

    states: Tensor | None = None  # [P, hidden] in the precision of the pass that computed them; None: not kept
    source: Tensor | None = None  # Long [B, T]: the number of the state of each cell; any state on padding
    in_tuple: bool = False  # whether the layers return a tuple
    too_large: bool = False  # they would need more than MAX_BYTES

    def rows(self, rows: Tensor) -> KeptStates:
        """Those of ``rows`` (Long); the states are not copied."""
        source = None if self.source is None else self.source[rows]
        return KeptStates(self.states, source, self.in_tuple)

    def release(self) -> None:
        """Frees the memory. Later passes run all layers."""
        self.states = self.source = None

    def record(self, layer: nn.Module, args: Any, options: dict[str, Any], output: Any) -> None:
        """A forward hook of the last frozen layer, whose output is [rows, T, hidden], or [1, P, hidden] if packed.

        Each pass adds its rows to those of the passes before.
        """
        self.in_tuple = isinstance(output, tuple)
        hidden: Tensor = output[0] if self.in_tuple else output
        packing: Packing | None = options.get("rlchat_packing")
        if packing is not None:
            source = packing.source
        else:
            cells = torch.arange(hidden.shape[:2].numel(), device=hidden.device)
            source = cells.view(hidden.shape[:2])
        states = hidden.detach().flatten(0, 1)
        if self.states is not None and self.source is not None:
            source = torch.cat([self.source, source + len(self.states)])
            states = torch.cat([self.states, states])
        self.too_large = self.too_large or states.numel() * states.element_size() > MAX_BYTES
        if self.too_large:
            self.release()
        else:
            self.states, self.source = states, source


class _KeptOutput:
    """The forward method of skipped layers: each returns the kept states, and the last one's reach a trained layer."""

    def __init__(self, kept: KeptStates) -> None:
        self.kept = kept
        self.output: Any = None

    def __call__(self, *_: Any, rlchat_packing: Packing | None = None, **__: Any) -> Any:
        if self.output is None:  # the first layer of this pass
            assert self.kept.states is not None
            assert self.kept.source is not None
            source = self.kept.source if rlchat_packing is None else rlchat_packing.pack(self.kept.source)
            hidden = nn.functional.embedding(source, self.kept.states)
            self.output = (hidden,) if self.kept.in_tuple else hidden
        return self.output


class FrozenLayers:
    """Records and skips the frozen layers of networks.

    Args:
        part: which weights are trained.
        policy: the network whose pass is recorded.
        others: networks that can start from its states; one with other frozen weights runs all its layers.
    """

    def __init__(self, part: TrainedPart, policy: RLChatModel, others: Sequence[RLChatModel | Critic]) -> None:
        self._policy = policy
        # Compared before training: sharded networks have parameters of their own.
        shared = [p for layer in frozen_layers(policy.backbone, part) for p in layer.parameters()]
        self._layers: dict[RLChatModel | Critic, list[nn.Module]] = {}
        for network in (policy, *others):
            layers = frozen_layers(network.backbone, part)
            own = [p for layer in layers for p in layer.parameters()]
            if len(own) == len(shared) and all(p is q for p, q in zip(own, shared, strict=True)):
                self._layers[network] = layers
        self.can_skip: bool | None = None if shared else False  # None before the first rollout, which is checked
        self._announced = False

    @contextmanager
    def recorded(self) -> Iterator[KeptStates]:
        """A context for the policy's passes over all rows of a rollout; the states are kept if they fit in memory."""
        if self.can_skip is None:
            # Each network, because its first pass also checks whether it takes packed batches: no layer may be skipped.
            networks = self._layers
            self.can_skip = all(can_skip_layers(n.backbone, partial(self._full_and_short_pass, n)) for n in networks)
        kept = KeptStates()
        if not self.can_skip:
            yield kept
            return
        handle = self._layers[self._policy][-1].register_forward_hook(kept.record, with_kwargs=True)
        try:
            yield kept
        finally:
            handle.remove()
        if kept.too_large and not self._announced and is_first():
            self._announced = True
            _log.info("the frozen layers run in every pass: their output for a rollout needs more than 1 GiB")

    @contextmanager
    def skipped(self, network: RLChatModel | Critic, kept: KeptStates | None) -> Iterator[None]:
        """A context for one forward pass of ``network`` over the tokens of ``kept``."""
        layers = self._layers.get(network, [])
        if kept is None or kept.states is None or not layers:
            yield
            return
        output = _KeptOutput(kept)
        before = [vars(layer).get("forward") for layer in layers]  # that of gradient checkpointing, or none
        for layer in layers:
            layer.forward = output
        try:
            yield
        finally:
            for layer, forward in zip(layers, before, strict=True):
                if forward is None:
                    del layer.forward
                else:
                    layer.forward = forward

    def _full_and_short_pass(
        self, network: RLChatModel | Critic, ids: Tensor, mask: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Outputs of ``network`` for ``rows``: from a pass over all rows, and from one that skips frozen layers."""
        kept = KeptStates()
        # The whole network runs, not its backbone alone: if it is sharded, its forward gathers the weights. Its first
        # pass ever checks, with passes of other batches, whether it takes packed batches; these are not recorded.
        network(ids, mask)
        handle = self._layers[network][-1].register_forward_hook(kept.record, with_kwargs=True)
        try:
            full = network(ids, mask)
        finally:
            handle.remove()
        if kept.states is None:
            raise NotImplementedError("its layers do not run one after the other")
        with self.skipped(network, kept.rows(rows)):
            short = network(ids[rows], mask[rows])
        return full[rows], short
