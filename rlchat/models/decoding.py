"""Decoding with a key-value cache of fixed size, whose steps a GPU replays as a CUDA graph.

A step of decoding runs hundreds of small kernels, and Python needs several times longer to launch them than a GPU needs
to run them. A CUDA graph records them once and launches them together. That requires tensors whose shapes and addresses
do not change: the cache has room for the whole response from the start, and each step writes the next column.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from rlchat.distributed.collectives import is_sharded
from rlchat.errors import one_line
from rlchat.models.decode_steps.step import step_decoder
from rlchat.models.kv_cache import Cache, append_rows, can_append, is_empty, keep_rows
from rlchat.models.networks import RLChatModel
from rlchat.models.packing import PACKABLE_SDPA
from rlchat.models.probe import can_fix_cache

_WORTH_A_PASS = 256  # tokens of padding that take longer than another pass

_ALIGNMENT = 16  # columns; attention kernels want masks whose width is a multiple of 8

_log = logging.getLogger("rlchat")


class FixedDecoder:
    """The logits of each next token of a batch, with a cache of fixed size; a CUDA graph runs all steps but the first.

    Call it as :func:`rlchat.models.sampling.sample` does: with the prompts first, then with one new token per row, and
    always with the mask of all tokens so far. The logits that it returns are overwritten by the next call. Weights must
    stay at their addresses while it is used, so it serves one batch.

    Args:
        model: a policy for which :func:`can_decode_fixed` is True.
        columns: the number of tokens of the longest row, response included.
    """

    def __init__(self, model: RLChatModel, columns: int) -> None:
        self._model = model
        self._at = torch.zeros(1, dtype=torch.long, device=model.backbone.device)  # the column of the next token
        self._columns = -(-columns // _ALIGNMENT) * _ALIGNMENT
        self._cache = model.backbone.new_cache()
        assert isinstance(self._cache, DynamicCache)
        self._cache.layers = [_FixedLayer(self._columns, self._at) for _ in self._cache.layers]
        self._graph: torch.cuda.CUDAGraph | None = None
        self._capture = self._at.is_cuda and model.backbone.graphs is not False
        self._logits: Tensor | None = None  # [batch, vocabulary]: the output of the graph

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits [batch, vocabulary] after ``ids`` [batch, time]; ``mask`` Bool [batch, cached + time]."""
        if self._logits is None:
            return self._read_prompts(ids, mask)
        new, column = mask[:, -1:], mask.shape[1] - 1
        self._ids.copy_(ids)
        self._visible[:, 0, 0, column] = new[:, 0]
        self._positions.add_(new)  # a row that has ended keeps its position, as its new tokens are padding
        self._at.fill_(column)
        if self._capture:
            self._capture = False
            with torch.cuda.device(self._at.device):
                self._graph = self._captured()
            self._model.backbone.graphs = self._graph is not None
        if self._graph is not None:
            with torch.cuda.device(self._at.device):
                self._graph.replay()
        else:
            self._logits = self._step()
        return self._logits

    def _read_prompts(self, ids: Tensor, mask: Tensor) -> Tensor:
        self._logits = read_prompts(self._model, ids, mask, self._cache)
        self._ids = ids[:, -1:].clone()
        self._positions = (mask.long().sum(1, keepdim=True) - 1).clamp(min=0)
        self._visible = torch.zeros(len(ids), 1, 1, self._columns, dtype=torch.bool, device=ids.device)
        self._visible[:, 0, 0, : mask.shape[1]] = mask
        return self._logits

    def _step(self) -> Tensor:
        hidden = self._model.backbone.decode(self._ids, self._visible, self._positions, self._cache)
        return self._model.logits(hidden[:, -1])

    def _captured(self) -> torch.cuda.CUDAGraph | None:
        """The graph of a step, or None if the model has an operation that a graph cannot contain."""
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        mode = torch.cuda.get_sync_debug_mode()
        try:
            # Libraries allocate memory at their first call, which a graph cannot contain. If the step waits for the
            # GPU, no graph is tried: PyTorch does not recover well from a capture that fails.
            torch.cuda.set_sync_debug_mode("error")
            with torch.cuda.stream(aside):
                self._step()
            torch.cuda.set_sync_debug_mode(mode)
            here.wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._logits = self._step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            _log.info("decoding runs without a CUDA graph: %s", one_line(error))
            torch.cuda.set_stream(here)
            here.wait_stream(aside)
            return None
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        return graph


def decode_with(model: RLChatModel, cache: Cache) -> Callable[[Tensor, Tensor], Tensor]:
    """A function from new ids [batch, time] and the mask [batch, cached + time] to the next logits [batch, vocabulary].

    It appends the ids to ``cache``. On a CPU, common families decode single tokens without modules, which is faster.
    """
    step = step_decoder(model.backbone, cache)

    def decode(ids: Tensor, mask: Tensor) -> Tensor:
        if is_empty(cache):
            return read_prompts(model, ids, mask, cache)
        if step is not None and ids.shape[1] == 1:
            return model.logits(step(ids, mask))
        return model.logits(model(ids, mask, cache)[:, -1])

    return decode


def read_prompts(model: RLChatModel, ids: Tensor, mask: Tensor, cache: Cache) -> Tensor:
    """Logits [batch, vocabulary] after prompts ``ids`` [batch, time], which an empty ``cache`` takes up.

    Adjacent rows with the same prompt are read once: the responses to it share the work.
    """
    hidden, row = read_rows(model, ids, mask, cache)
    return model.logits(hidden)[row]


def read_rows(model: RLChatModel, ids: Tensor, mask: Tensor, cache: Cache) -> tuple[Tensor, Tensor]:
    """Fills the empty ``cache`` with left-padded rows ``ids`` [batch, time]; adjacent equal rows are read once.

    Returns the last hidden states [distinct, hidden] and the index in them of each row, Long [batch]. Rows of very
    different lengths are read in several passes, so that a long row does not pad many short ones.
    """
    prompts = torch.where(mask, ids, -1)  # padding may be any id
    distinct, row = prompts.unique_consecutive(return_inverse=True, dim=0)
    if len(distinct) < len(ids):
        ids, mask = distinct.clamp(min=0), distinct >= 0
    # All processes with a sharded model have to run the same number of passes.
    groups = [] if is_sharded(model) or not can_append(cache) else _groups_by_length(mask.sum(1).tolist())
    if len(groups) < 2:
        hidden = model(ids, mask, cache)[:, -1]
    else:
        parts = []
        for number, rows in enumerate(groups):
            width = int(mask[rows].sum(1).max())
            read = cache if number == 0 else model.backbone.new_cache()
            parts.append(model(ids[rows, -width:], mask[rows, -width:], read)[:, -1])
            if number:
                append_rows(cache, read)
        order = torch.tensor([row for rows in groups for row in rows], device=ids.device).argsort()
        hidden = torch.cat(parts)[order]
        keep_rows(cache, order)
    if len(distinct) < len(row):
        keep_rows(cache, row)
    return hidden, row


def _groups_by_length(lengths: list[int]) -> list[list[int]]:
    """The numbers of rows to read together, the longest first.

    A group ends where the next row has at most half its length, if that saves a pass's worth of padding.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    groups: list[list[int]] = []
    longest = 0
    for done, row in enumerate(order):
        saved = (longest - lengths[row]) * (len(order) - done)
        if not groups or (lengths[row] <= longest // 2 and saved >= _WORTH_A_PASS):
            groups.append([])
            longest = lengths[row]
        groups[-1].append(row)
    return groups


def can_decode_fixed(model: RLChatModel) -> bool:
    """Whether :class:`FixedDecoder` can decode with ``model``: on CUDA, with plain attention, and not sharded.

    A backbone is checked once, with short forward passes.
    """
    backbone = model.backbone
    if backbone.device.type != "cuda" or backbone.is_encoder or is_sharded(backbone):
        return False
    if backbone.transformer.config._attn_implementation not in ("sdpa", PACKABLE_SDPA):
        return False
    if backbone.fixed_cache is None:
        backbone.fixed_cache = can_fix_cache(backbone, lambda columns: FixedDecoder(model, columns))
    return backbone.fixed_cache


class _FixedLayer(DynamicLayer):
    """Keys and values [batch, heads, columns, width] of a layer. The first update adds the prompts, each later one the
    column ``at`` Long [1]."""

    def __init__(self, columns: int, at: Tensor) -> None:
        super().__init__()
        self._columns, self._at = columns, at

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds keys and values [batch, heads, time, width]; returns those that the new tokens may attend to."""
        if self.keys is None or self.values is None:
            self.is_initialized = True
            self.device, self.dtype = key_states.device, key_states.dtype
            self.keys, self.values = (_widened(x, self._columns) for x in (key_states, value_states))
            return key_states, value_states
        self.keys.index_copy_(2, self._at, key_states)
        self.values.index_copy_(2, self._at, value_states)
        return self.keys, self.values


def _widened(x: Tensor, columns: int) -> Tensor:
    wide = x.new_zeros(*x.shape[:2], columns, x.shape[3])
    wide[:, :, : x.shape[2]] = x
    return wide
