"""Operations on key-value caches: shortening, and adding and removing rows of a batch.

Keys and values are [batch, heads, columns, width], the newest token in the last column. Rows of different lengths share
a cache: shorter rows begin with padding, which the attention mask hides and positions do not count.
"""

from __future__ import annotations

from collections import UserDict
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor, cat, nn
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# The new columns of a layer that has no room: a quarter of its columns, and no fewer than this.
_LEAST_ROOM = 32


class EncoderCache(UserDict[nn.Module, tuple[Tensor, Tensor]]):
    """Keys and values of each attention layer. Not a dict, because FSDP2 copies dicts when it moves inputs."""


Cache = DynamicCache | EncoderCache
"""transformers' cache for decoders, rlchat's cache for encoders."""


class GrowingLayer(DynamicLayer):
    """A layer with room for more columns: a new token is written there, and those before it are rarely copied.

    ``keys`` and ``values`` [batch, heads, columns, width] are the used part of the room. If other code replaces them,
    for example to remove rows, the next update copies them into new room.
    """

    _room: tuple[Tensor, Tensor] | None = None
    _used: Tensor | None = None  # keys, as the last update left them

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends columns [batch, heads, time, width]; returns keys and values of all columns."""
        before = self.get_seq_length()
        if before == 0 or key_states.requires_grad:  # the backward pass needs tensors that nothing is written to
            self._room = None
            return super().update(key_states, value_states, *args, **kwargs)
        assert self.keys is not None
        assert self.values is not None
        after = before + key_states.shape[2]
        if self._room is None or self._used is not self.keys or after > self._room[0].shape[2]:
            self._room = None  # frees it, if nothing else refers to it
            self._room = _with_room(self.keys, after), _with_room(self.values, after)
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, before:after] = new
        self.keys, self.values = (room[:, :, :after] for room in self._room)
        self._used = self.keys
        return self.keys, self.values

    def reorder_cache(self, beam_idx: LongTensor) -> None:
        """Keeps the rows with the indices ``beam_idx`` [kept], in that order, and frees the memory of the others."""
        super().reorder_cache(beam_idx)
        self._room = self._used = None


_PLAIN = (DynamicLayer, GrowingLayer)  # these keep all columns; subclasses of DynamicLayer in transformers may not


def decoder_cache(config: PretrainedConfig, device: torch.device) -> DynamicCache:
    """An empty cache for a decoder. On a CPU, its plain layers grow without a copy of all columns at each token."""
    cache = DynamicCache(config=config)
    if device.type == "cpu":
        cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def is_empty(cache: Cache) -> bool:
    """Whether ``cache`` contains no state of any layer."""
    if isinstance(cache, EncoderCache):
        return not cache
    return not any(_holds_state(layer) for layer in cache.layers)


def _holds_state(layer: object) -> bool:
    recurrent = getattr(layer, "has_previous_state", False)  # a dict by state in newer versions of transformers
    if any(recurrent.values()) if isinstance(recurrent, dict) else recurrent is True:
        return True
    keys = getattr(layer, "keys", None)
    return isinstance(keys, Tensor) and keys.numel() > 0


def can_append(cache: Cache) -> bool:
    """Whether rows can be added. That requires all columns; sliding windows and recurrent states do not keep them."""
    return isinstance(cache, EncoderCache) or all(type(layer) in _PLAIN for layer in cache.layers)


def keep_rows(cache: Cache, rows: Tensor) -> None:
    """Keeps only the rows with the indices ``rows`` Long [kept], in that order."""
    if isinstance(cache, EncoderCache):
        for module, (keys, values) in cache.items():
            cache[module] = keys[rows], values[rows]
    else:
        cache.reorder_cache(cast(LongTensor, rows))


def drop_columns(cache: Cache, count: int) -> None:
    """Removes the first ``count`` columns, which are padding in every row. Requires :func:`can_append`."""
    if isinstance(cache, EncoderCache):
        for module, (keys, values) in cache.items():
            cache[module] = keys[:, :, count:], values[:, :, count:]
    else:
        for layer in _layers(cache):
            layer.keys, layer.values = layer.keys[:, :, count:], layer.values[:, :, count:]


def append_rows(cache: Cache, other: Cache) -> None:
    """Appends the rows of ``other`` to ``cache``; the one with fewer columns is padded with zeros on the left."""
    if isinstance(cache, EncoderCache):
        assert isinstance(other, EncoderCache)
        for module, (keys, values) in cache.items():
            cache[module] = _stack(keys, other[module][0]), _stack(values, other[module][1])
    else:
        assert isinstance(other, DynamicCache)
        for layer, more in zip(_layers(cache), _layers(other), strict=True):
            layer.keys, layer.values = _stack(layer.keys, more.keys), _stack(layer.values, more.values)


def shorten(cache: Cache, length: int) -> bool:
    """Shortens ``cache`` to its first ``length`` tokens. Returns False if a layer cannot be shortened.

    Recurrent layers and full sliding windows cannot be shortened: they no longer contain the earlier state.
    """
    if isinstance(cache, EncoderCache):
        cache.update({module: (key[:, :, :length], value[:, :, :length]) for module, (key, value) in cache.items()})
        return True
    for layer in cache.layers:
        if type(layer) not in (*_PLAIN, DynamicSlidingWindowLayer):
            return False
        assert isinstance(layer, DynamicLayer)
        too_many = layer.get_seq_length() - length if layer.is_initialized else 0
        full = isinstance(layer, DynamicSlidingWindowLayer) and layer.get_seq_length() >= layer.sliding_window
        if too_many < 0 or (too_many > 0 and full):
            return False
        if too_many:
            layer.crop(-too_many)
    return True


class _Layer(Protocol):
    keys: Tensor
    values: Tensor


def _layers(cache: DynamicCache) -> list[_Layer]:
    return cast(list[_Layer], cache.layers)


def _stack(first: Tensor, second: Tensor) -> Tensor:
    columns = max(first.shape[2], second.shape[2])
    return cat([F.pad(part, (0, 0, columns - part.shape[2], 0)) for part in (first, second)])


def _with_room(x: Tensor, columns: int) -> Tensor:
    """A copy of ``x`` [batch, heads, time, width] with more than ``columns`` columns; the new ones are not set."""
    room = x.new_empty(*x.shape[:2], columns + max(_LEAST_ROOM, columns // 4), x.shape[3])
    room[:, :, : x.shape[2]] = x
    return room
