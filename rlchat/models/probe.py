"""Checks the properties of a backbone with a few short forward passes when it is constructed.

If a check fails, the error names the property. The tolerance is relative: rounding of the hidden states, plus a
hundredth of the effect of the second-to-last token on the last hidden state.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn, TypeVar

import torch
from torch import Tensor

from rlchat.distributed.collectives import is_first
from rlchat.errors import UserError, one_line
from rlchat.models.families import encoder_families
from rlchat.models.kv_cache import Cache, can_append, is_empty, keep_rows
from rlchat.models.packing import PACKABLE_SDPA, plan_packing
from rlchat.models.token_stats import UNSAYABLE_LOGIT, cuda_products

if TYPE_CHECKING:
    from rlchat.models.backbones import Backbone

_LENGTH = 10  # tokens of a probed row
_PADDING = 3
_LONGEST = 160  # tokens; a row longer than a sliding window is probed up to here
_ROUNDING = 1e-4  # of the largest hidden value
_LOW_PRECISION_ROUNDING = 2e-2  # in bfloat16 and float16

T = TypeVar("T")
_log = logging.getLogger("rlchat")


@torch.no_grad()
def probe(backbone: Backbone, max_length: int) -> None:
    """Raises :class:`UserError` that names the first property that ``backbone`` lacks; ``max_length`` limits the rows.

    The properties: hidden states of the declared width; no leak from later tokens; the cache is used; cached equals
    full over several steps; left-padded equals unpadded, with and without a cache; rows of a batch can be reordered in
    the cache; a row longer than the sliding window gives the same results with and without a cache.
    """
    training = backbone.training
    backbone.eval()
    try:
        _probe(backbone, max_length)
    finally:
        backbone.train(training)


@torch.no_grad()
def check_cache_is_used(backbone: Backbone) -> None:
    """Raises :class:`UserError` if a forward pass of one token leaves the cache empty.

    For model files: their backbone was probed when it was created, perhaps with another version of transformers.
    """
    training = backbone.training
    backbone.eval()
    ids, mask = _row(backbone, 1)
    cache = backbone.new_cache()
    _attempt(backbone, "with a cache", lambda: backbone(ids, mask, cache))
    backbone.train(training)
    if is_empty(cache):
        _refuse(backbone, "ignores the cache argument")


@torch.no_grad()
def can_pack(backbone: Backbone) -> bool:
    """Whether ``backbone`` gives the same hidden states for a packed batch; see :mod:`rlchat.models.packing`.

    Sets its attention to the one that takes packed tokens if it is plain sdpa attention.
    """
    transformer = backbone.transformer
    config = transformer.config
    if not _attends_to_whole_rows(backbone):
        return False
    before = config._attn_implementation
    if not backbone.is_encoder and before != "sdpa":
        return False
    if not backbone.is_encoder:
        transformer.set_attn_implementation(PACKABLE_SDPA)
    training = backbone.training
    backbone.eval()
    try:
        with torch.autocast(backbone.device.type, enabled=False):
            equal = _packed_equals_plain(backbone)
    except Exception as error:  # any error means that the family cannot be packed
        _log.debug("batches of %s are not packed: %s", config.model_type, one_line(error))
        equal = False
    backbone.train(training)
    if not equal and not backbone.is_encoder:
        transformer.set_attn_implementation(before)
    return equal


@torch.no_grad()
def can_skip_layers(backbone: Backbone, passes: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> bool:
    """Whether the outputs of a network are the same if the frozen layers of its ``backbone`` are skipped.

    ``passes(ids, mask, rows)`` returns those for ``rows`` (Long) from a full pass over the batch ``ids`` [2, time], and
    from a pass over these rows that starts from kept states; see :class:`rlchat.ppo.frozen_layers.FrozenLayers`.
    """
    training = backbone.training
    backbone.eval()
    ids, mask = _two_rows(backbone)
    try:
        with torch.autocast(backbone.device.type, enabled=False):
            # On a CPU, the first two are packed; the last one has no padding and is not.
            for rows in (torch.tensor(rows, device=ids.device) for rows in ([0, 1], [1], [0])):
                full, short = passes(ids, mask, rows)
                rounding = _ROUNDING if full.dtype == torch.float32 else _LOW_PRECISION_ROUNDING
                if not _equal(short[mask[rows]], full[mask[rows]], rounding * float(full.abs().max())):
                    raise NotImplementedError("its trained layers depend on more than the output of the frozen ones")
    except torch.OutOfMemoryError:  # says nothing about the family
        raise
    except Exception as error:  # any other error means that the family needs all its layers
        if is_first():
            family = backbone.transformer.config.model_type
            _log.info("the frozen layers of %s run in every pass: %s", family, one_line(error))
        return False
    finally:
        backbone.train(training)
    return True


@torch.no_grad()
def can_fix_cache(backbone: Backbone, decoder: Callable[[int], Callable[[Tensor, Tensor], Tensor]]) -> bool:
    """Whether ``decoder`` gives the logits that it gives with prompts that contain all tokens.

    ``decoder(columns)`` is a :class:`rlchat.models.decoding.FixedDecoder` of this backbone.
    """
    if not _attends_to_whole_rows(backbone) or not can_append(backbone.new_cache()):
        return False
    training = backbone.training
    backbone.eval()
    ids, mask = _row(backbone, _LENGTH)
    ids, mask = ids.repeat(2, 1), mask.repeat(2, 1)
    mask[1, :_PADDING] = False
    try:
        with torch.autocast(backbone.device.type, enabled=False), cuda_products("highest"):
            rounding = _ROUNDING if backbone.head_weight.dtype == torch.float32 else _LOW_PRECISION_ROUNDING
            return _steps_equal_prompts(ids, mask, decoder, rounding)
    except torch.OutOfMemoryError:  # says nothing about the family
        raise
    except Exception as error:  # any other error means that the family needs a cache that grows
        _log.info("%s decodes with a growing cache: %s", backbone.transformer.config.model_type, one_line(error))
        return False
    finally:
        backbone.train(training)


@torch.no_grad()
def can_step(backbone: Backbone, decoder: Callable[[Cache], Callable[[Tensor, Tensor], Tensor]]) -> bool:
    """Whether ``decoder`` gives the hidden states of the forward pass of ``backbone``, which is in eval mode.

    ``decoder(cache)`` is a :class:`rlchat.models.decode_steps.step.StepDecoder` of this backbone.
    """
    if not _attends_to_whole_rows(backbone):
        return False
    ids, mask = _row(backbone, _LENGTH)
    ids, mask = ids.repeat(2, 1), mask.repeat(2, 1)
    rounding = _ROUNDING if backbone.head_weight.dtype == torch.float32 else _LOW_PRECISION_ROUNDING
    try:
        for padding in (0, _PADDING):
            mask[1, :padding] = False
            one, other = backbone.new_cache(), backbone.new_cache()
            for cache in (one, other):
                backbone(ids[:, :-3], mask[:, :-3], cache)
            step = decoder(one)
            for end in range(_LENGTH - 2, _LENGTH + 1):
                new, visible = ids[:, end - 1 : end], mask[:, :end]
                expected = backbone(new, visible, other)[:, 0]
                if not _equal(step(new, visible), expected, rounding * float(expected.abs().max())):
                    return False
    except Exception as error:  # any error means that this version of transformers has other modules
        _log.info("%s decodes through transformers: %s", backbone.transformer.config.model_type, one_line(error))
        return False
    return True


def _steps_equal_prompts(
    ids: Tensor, mask: Tensor, decoder: Callable[[int], Callable[[Tensor, Tensor], Tensor]], rounding: float
) -> bool:
    in_steps = decoder(_LENGTH)
    in_steps(ids[:, :-3], mask[:, :-3])
    for end in range(_LENGTH - 2, _LENGTH + 1):
        logits, expected = in_steps(ids[:, end - 1 : end], mask[:, :end]), decoder(_LENGTH)(ids[:, :end], mask[:, :end])
        sayable = expected > UNSAYABLE_LOGIT
        if not _equal(logits[sayable], expected[sayable], rounding * float(expected[sayable].abs().max())):
            return False
    return True


def _attends_to_whole_rows(backbone: Backbone) -> bool:
    """Whether each token attends to all tokens before it."""
    config = backbone.transformer.config
    whole_rows = set(getattr(config, "layer_types", None) or ()) <= {"full_attention"}
    return whole_rows and _window(backbone) is None and not getattr(config, "attention_chunk_size", None)


def _packed_equals_plain(backbone: Backbone) -> bool:
    ids, mask = _two_rows(backbone)
    packing = plan_packing(ids, mask)
    assert packing is not None
    packed = packing.spread(backbone.packed(ids, packing))
    for number, length in enumerate((_LENGTH, _LENGTH - _PADDING)):
        plain = backbone(ids[number, None, :length], mask[number, None, :length])[0]
        rounding = _ROUNDING if plain.dtype == torch.float32 else _LOW_PRECISION_ROUNDING
        if not _equal(packed[number, :length], plain, rounding * float(plain.abs().max())):
            return False
    return True


def _probe(backbone: Backbone, max_length: int) -> None:
    if backbone.is_encoder and (window := _window(backbone)) is not None:
        _refuse(backbone, f"attends within a sliding window of {window} tokens, which is not supported for encoders")
    length = max(2, min(_LENGTH, max_length))
    ids, mask = _row(backbone, length)
    full = _attempt(backbone, "on a short row", lambda: backbone(ids, mask))
    if full.shape != (1, length, backbone.hidden_size):
        _refuse(backbone, f"gives hidden states of width {full.shape[-1]}, expected {backbone.hidden_size}")
    if not full.isfinite().all():
        _refuse(backbone, "gives hidden states that are not finite")
    if length < 3:
        return
    tolerance = _tolerance(backbone, ids, mask, full)
    _check_no_leak(backbone, ids, mask, full, tolerance)
    _check_cache(backbone, ids, mask, full, tolerance)
    _check_left_padding(backbone, ids, mask, full, tolerance)
    window = _window(backbone)
    if window is not None and length <= window + 4 <= min(max_length, _LONGEST):
        ids, mask = _row(backbone, window + 4)
        full = _attempt(backbone, "on a row longer than its sliding window", lambda: backbone(ids, mask))
        cached = _attempt(
            backbone,
            "with a cache longer than its sliding window",
            lambda: _in_steps(backbone, ids, mask, backbone.new_cache(), window - 1),
        )
        if not _equal(cached, full, tolerance):
            _refuse(backbone, "gives different results with and without a cache when a row is longer than its window")


def _check_no_leak(backbone: Backbone, ids: Tensor, mask: Tensor, full: Tensor, tolerance: float) -> None:
    for place in (1, ids.shape[1] // 2, ids.shape[1] - 1):
        changed = backbone(_changed(backbone, ids, place), mask)
        if not _equal(changed[:, :place], full[:, :place], tolerance):
            _refuse(backbone, "sees later tokens and cannot be made causal")


def _check_cache(backbone: Backbone, ids: Tensor, mask: Tensor, full: Tensor, tolerance: float) -> None:
    cache = _attempt(backbone, "with a cache", backbone.new_cache)
    cached = _attempt(backbone, "with a cache", lambda: _in_steps(backbone, ids, mask, cache, max(1, ids.shape[1] - 4)))
    if is_empty(cache):
        _refuse(backbone, "ignores the cache argument")
    if not _equal(cached, full, tolerance):
        _refuse(backbone, "gives different results with and without a cache")


def _check_left_padding(backbone: Backbone, ids: Tensor, mask: Tensor, full: Tensor, tolerance: float) -> None:
    """Checks a batch of the row and a copy whose first tokens are replaced by padding."""
    padding = min(_PADDING, ids.shape[1] - 2)
    batch, batch_mask = ids.repeat(2, 1), mask.repeat(2, 1)
    batch[1, :padding] = batch[1, -1]
    batch_mask[1, :padding] = False
    short = backbone(ids[:, padding:], mask[:, padding:])
    cache = backbone.new_cache()
    runs: tuple[tuple[str, Callable[[], Tensor]], ...] = (
        ("without a cache", lambda: backbone(batch, batch_mask)),
        ("with a cache", lambda: _in_steps(backbone, batch, batch_mask, cache, ids.shape[1] - 2)),
    )
    for name, run in runs:
        hidden = _attempt(backbone, f"on a left-padded row {name}", run)
        if not (_equal(hidden[1:, padding:], short, tolerance) and _equal(hidden[:1], full, tolerance)):
            _refuse(backbone, f"gives different results for a left-padded row and an unpadded one ({name})")
    _attempt(backbone, "when rows of a cached batch are removed", lambda: keep_rows(cache, torch.tensor([1])))


def _row(backbone: Backbone, length: int) -> tuple[Tensor, Tensor]:
    """A row of ``length`` tokens that differ from their neighbours, and its mask."""
    ids = (torch.arange(length, device=backbone.device) * 7 + 5) % backbone.vocab_size
    return ids[None], torch.ones(1, length, dtype=torch.bool, device=backbone.device)


def _two_rows(backbone: Backbone) -> tuple[Tensor, Tensor]:
    """Two rows with the same first half, and their mask: the second one is padded on the right."""
    row, mask = _row(backbone, _LENGTH)
    padded = mask.clone()
    padded[:, -_PADDING:] = False
    return torch.cat([row, _changed(backbone, row, _LENGTH // 2)]), torch.cat([mask, padded])


def _changed(backbone: Backbone, ids: Tensor, place: int) -> Tensor:
    other = ids.clone()
    other[:, place] = (other[:, place] + 3) % backbone.vocab_size
    return other


def _in_steps(backbone: Backbone, ids: Tensor, mask: Tensor, cache: Cache, first: int) -> Tensor:
    """Hidden states of ``ids``: ``first`` tokens at once, then one at a time."""
    ends = [first, *range(first + 1, ids.shape[1] + 1)]
    starts = [0, *ends[:-1]]
    steps = [backbone(ids[:, a:b], mask[:, :b], cache) for a, b in zip(starts, ends, strict=True)]
    return torch.cat(steps, 1)


def _tolerance(backbone: Backbone, ids: Tensor, mask: Tensor, full: Tensor) -> float:
    effect = (backbone(_changed(backbone, ids, ids.shape[1] - 2), mask) - full)[:, -1].abs().max()
    return float(_ROUNDING * full.abs().max() + 0.01 * effect)


def _equal(one: Tensor, other: Tensor, tolerance: float) -> bool:
    return bool(((one - other).abs() <= tolerance).all())  # False for NaN


def _window(backbone: Backbone) -> int | None:
    """The sliding window in tokens, or None if every layer attends to the whole row."""
    config = backbone.transformer.config
    if getattr(config, "use_sliding_window", True) is False:
        return None
    for name in ("sliding_window", "local_attention", "attention_window"):
        if isinstance(window := getattr(config, name, None), int) and window > 0:
            return window
    return None


def _attempt(backbone: Backbone, where: str, run: Callable[[], T]) -> T:
    try:
        return run()
    except UserError:
        raise
    except Exception as error:  # any error means that the family cannot be used
        _refuse(backbone, f"fails {where} ({type(error).__name__}: {one_line(error)})", error)


def _refuse(backbone: Backbone, reason: str, cause: Exception | None = None) -> NoReturn:
    family = backbone.transformer.config.model_type
    raise UserError(
        f"base_model: the model family {family!r} {reason}; choose a decoder such as gpt2, llama or qwen3, or one of "
        f"{', '.join(sorted(encoder_families().keys() - {family}))}"
    ) from cause
