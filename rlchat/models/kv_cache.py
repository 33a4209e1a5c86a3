"""Operations on key-value caches: shortening, and adding and removing rows of a batch.

Keys and values are [batch, heads, columns, width], the newest token in the last column. Rows of different lengths share
a cache: shorter rows begin with padding, which the attention mask hides and positions do not count.
"""

from __future__ import annotations

from collections import UserDict
from typing import Protocol, cast

import torch.nn.functional as F
from torch import LongTensor, Tensor, cat, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class EncoderCache(UserDict[nn.Module, tuple[Tensor, Tensor]]):
    """Keys and values of each attention layer. Not a dict, because FSDP2 copies dicts when it moves inputs."""


Cache = DynamicCache | EncoderCache
"""transformers' cache for decoders, rlchat's cache for encoders."""


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
    return isinstance(cache, EncoderCache) or all(type(layer) is DynamicLayer for layer in cache.layers)


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
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
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
