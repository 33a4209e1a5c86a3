"""`sample()`: the only sampling loop in rlchat; rollouts, validation, chat and server all use it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rlchat.distributed.collectives import is_sharded
from rlchat.errors import NonFiniteError
from rlchat.models.decoding import FixedDecoder, can_decode_fixed, decode_with, read_rows
from rlchat.models.kv_cache import Cache, append_rows, can_append, drop_columns, keep_rows
from rlchat.models.networks import RLChatModel
from rlchat.utils.padding import pad

# Rows that have ended leave a batch when at most this share of it has not ended: each change copies the cache.
_LEAVING = 0.8

# Steps after which a GPU is asked whether rows have ended. Asking means waiting, and the GPU idles meanwhile.
_GPU_STEPS = 8

NOT_FINITE = "the model's logits are NaN or infinite, because its weights have diverged; use an earlier model file"

Decode = Callable[[Tensor, Tensor], Tensor]
"""New ids [batch, time] and the mask [batch, cached + time] → logits [batch, vocabulary] of the next token."""

Uniforms = Callable[[int], Tensor]
"""Position in the response → one number in [0, 1) for each row, [batch]: the only randomness of sampling."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Options for drawing the next token.

    ``temperature`` 0 selects the most likely token. ``top_k`` 0 and ``top_p`` 1 do not change the distribution, which
    rollouts require: the policy's log-probs are those of the distribution that was sampled from.
    """

    max_new_tokens: int = 100
    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"invalid value {self.max_new_tokens} for max_new_tokens: expected a positive integer")
        # Outside of this range, float32 logits overflow to NaN, or tokens with probability 0 become possible.
        if self.temperature != 0 and not 1e-6 <= self.temperature <= 1e6:
            raise ValueError(
                f"invalid value {self.temperature} for temperature: expected 0 (greedy) or a number from 1e-6 to 1e6"
            )
        if self.top_k < 0:
            raise ValueError(f"invalid value {self.top_k} for top_k: expected a non-negative integer")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"invalid value {self.top_p} for top_p: expected a number above 0 and at most 1")


class Step(NamedTuple):
    """One new token for every row."""

    tokens: Tensor  # Long [batch]
    logprobs: Tensor  # [batch] under the distribution that was sampled from; 0 if greedy


@dataclass(frozen=True, slots=True)
class Change:
    """Rows that leave and join a batch between two tokens; the caller of :func:`sample` may send it after a step.

    ``sampling`` and ``uniforms`` are those of the new batch: the rows that stay, then the rows that join. Positions
    continue to count from the first token of the batch.
    """

    keep: Sequence[int]  # the rows that stay, by their number in the old batch
    prompts: Sequence[Sequence[int]]  # the rows that join: ids, two or more each
    sampling: Sampling | Sequence[Sampling]
    uniforms: Uniforms


@dataclass(frozen=True, slots=True)
class Generated:
    """Sampled responses. ``mask`` is True where a token was sampled, the end marker included."""

    ids: Tensor  # Long [batch, response], padding where mask is False
    mask: Tensor  # Bool [batch, response]
    ended: Tensor  # Bool [batch]: the response ended with the end marker; False where it was truncated
    logprobs: Tensor  # [batch, response] under the distributions that were sampled from; 0 where mask is False


@torch.no_grad()
def sample(
    model: RLChatModel,
    ids: Tensor,
    attention_mask: Tensor,
    sampling: Sampling | Sequence[Sampling],
    uniforms: Uniforms,
    *,
    end_id: int,
    pad_id: int,
    goes_on: Callable[[Tensor], bool] = lambda alive: bool(alive.any()),
    cache: Cache | None = None,
    observe: Callable[[Tensor], None] = lambda logits: None,
    decode: Decode | None = None,
    check_every: int = 1,
) -> Generator[Step, Change | None, None]:
    """Yields the next token of every row until each has ended or reached its ``max_new_tokens``.

    ``ids`` [batch, prompt] are left-padded prompts, ``attention_mask`` True on their real tokens. ``sampling`` is one
    for all rows, or one for each. A row that has ended yields ``pad_id``. The caller may stop at any token. The model
    should be in eval mode: with dropout, the distribution would differ from the one that is trained. ``goes_on``
    decides from the unfinished rows ``alive`` [batch] whether there is another step; processes that hold a sharded
    model have to agree on it.

    A server keeps one batch running: ``send(change)`` instead of ``next`` removes rows and adds others. A row gets the
    same tokens, up to rounding, whatever other rows are in the batch and whenever it joined.

    ``cache`` holds the tokens before ``ids``, and ``attention_mask`` covers them too: [batch, cached + prompt]. The
    cache grows by ``ids`` and by every yielded token except the last. With None, nothing precedes ``ids``. ``observe``
    is called with the logits [batch, vocabulary] of each step before a token is drawn from them. ``decode`` replaces
    the model and its cache; rows cannot change then. Only every ``check_every`` steps find out whether all rows have
    ended, or raise :class:`NonFiniteError` because the weights have diverged.
    """
    cache = model.backbone.new_cache() if cache is None else cache
    decode = decode or decode_with(model, cache)
    alive = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    step, mask, ends = ids, attention_mask, _ends(sampling, len(ids), 0).to(ids.device)
    finite = torch.ones((), dtype=torch.bool, device=ids.device)
    longest = max(one.max_new_tokens for one in _of_each(sampling, len(ids)))
    for position in itertools.count():
        checks = (position + 1) % check_every == 0 or position + 1 >= longest
        observe(logits := decode(step, mask))
        drawn = choose(logits, sampling, uniforms(position).to(ids.device))
        finite = finite & drawn.finite
        if checks and not finite:
            raise NonFiniteError(NOT_FINITE)
        token = torch.where(alive, drawn.tokens, pad_id)
        change = yield Step(token, torch.where(alive, drawn.logprobs, 0.0))
        # A finished row continues with padding that no token attends to, so that all positions stay the same.
        mask = torch.cat([mask, alive[:, None]], 1)
        alive = alive & (token != end_id) & (position + 1 < ends)
        step = token[:, None]
        if change is not None:
            sampling, uniforms = change.sampling, change.uniforms
            joining, keep = len(change.prompts), torch.tensor(change.keep, dtype=torch.long, device=ids.device)
            step, mask = _change_rows(model, cache, step, mask, keep, change.prompts, pad_id)
            alive = torch.cat([alive[keep], alive.new_ones(joining)])
            theirs = sampling if isinstance(sampling, Sampling) else sampling[len(keep) :]
            ends = torch.cat([ends[keep], _ends(theirs, joining, position + 1).to(ids.device)])
        if checks and not goes_on(alive):
            return


def _ends(sampling: Sampling | Sequence[Sampling], rows: int, position: int) -> Tensor:
    """Long [rows]: the first position after the token limit of rows that start at ``position``."""
    return torch.tensor([position + one.max_new_tokens for one in _of_each(sampling, rows)], dtype=torch.long)


def _of_each(sampling: Sampling | Sequence[Sampling], rows: int) -> Sequence[Sampling]:
    return [sampling] * rows if isinstance(sampling, Sampling) else sampling


def _change_rows(
    model: RLChatModel,
    cache: Cache,
    step: Tensor,
    mask: Tensor,
    keep: Tensor,
    prompts: Sequence[Sequence[int]],
    pad_id: int,
) -> tuple[Tensor, Tensor]:
    """Changes the rows of ``cache``; returns the next input tokens [batch, 1] and the mask [batch, columns + 1].

    Prompts that join are processed except for their last token, which is the next input of their rows. Raises
    ValueError for a backbone whose cache cannot add rows.
    """
    keep_rows(cache, keep)
    step, mask = step[keep], mask[keep]
    if not can_append(cache):
        if prompts:
            raise ValueError("the cache of this backbone cannot add rows; finish the batch first")
        return step, mask
    if prompts:
        ids, theirs = (rows.to(step.device) for rows in pad(prompts, pad_id, "left"))
        read = model.backbone.new_cache()
        read_rows(model, ids[:, :-1], theirs[:, :-1], read)
        append_rows(cache, read)
        width = max(mask.shape[1], theirs.shape[1])
        step = torch.cat([step, ids[:, -1:]])
        mask = torch.cat([F.pad(part, (width - part.shape[1], 0)) for part in (mask, theirs)])
    unused = int(mask.any(0).int().argmax())  # columns that only the removed rows used
    drop_columns(cache, unused)
    return step, mask[:, unused:]


def generate(
    model: RLChatModel,
    ids: Tensor,
    attention_mask: Tensor,
    sampling: Sampling | Sequence[Sampling],
    uniforms: Uniforms,
    *,
    end_id: int,
    pad_id: int,
    goes_on: Callable[[Tensor], bool] = lambda alive: bool(alive.any()),
) -> Generated:
    """Complete responses to ``ids``: all steps of :func:`sample`, collected.

    Rows that have ended leave the batch as soon as they are a fifth of it, so that they cost no more time. With a cache
    of fixed size (see :mod:`rlchat.models.decoding`), they stay.
    """
    longest = max(one.max_new_tokens for one in _of_each(sampling, len(ids)))
    fixed = FixedDecoder(model, ids.shape[1] + longest) if can_decode_fixed(model) else None
    check_every = _steps_between_checks(ids.device)
    rows = torch.arange(len(ids), device=ids.device)  # in the batch now
    columns: list[Step] = []
    more: dict[str, Any] = {"goes_on": goes_on, "decode": fixed, "check_every": check_every}
    steps = sample(model, ids, attention_mask, sampling, uniforms, end_id=end_id, pad_id=pad_id, **more)
    change: Change | None = None
    with _casting_weights_once(model):
        while True:
            try:
                step = steps.send(change)
            except StopIteration:
                break
            tokens, logprobs = step.tokens.new_full((len(ids),), pad_id), step.logprobs.new_zeros(len(ids))
            columns.append(Step(tokens.index_copy(0, rows, step.tokens), logprobs.index_copy(0, rows, step.logprobs)))
            change = None
            if fixed is not None or len(columns) % check_every:
                continue
            stay = ((step.tokens != end_id) & (step.tokens != pad_id)).nonzero().squeeze(1)
            if 0 < len(stay) <= _LEAVING * len(rows):
                rows = rows[stay]
                noise = partial(_uniforms_of_rows, uniforms, rows.cpu())
                change = Change(stay.tolist(), (), _of_rows(sampling, rows), noise)
    tokens, logprobs = (torch.stack(column, dim=1) for column in zip(*columns, strict=True))
    mask = tokens != pad_id
    width = max(1, int(mask.any(0).sum()))  # the last columns are padding if a GPU was not asked after each step
    return Generated(tokens[:, :width], mask[:, :width], (tokens == end_id).any(1), logprobs[:, :width])


def _steps_between_checks(device: torch.device) -> int:
    return 1 if device.type == "cpu" else _GPU_STEPS


@contextmanager
def _casting_weights_once(model: RLChatModel) -> Iterator[None]:
    """Under autocast, trained weights are cast once for all forward passes in the context; they must not change there.

    Frozen weights are cast in every pass, because PyTorch keeps no copies of them. Nor are any kept of a sharded model:
    each process would gather all of it.
    """
    device = model.backbone.device.type
    if not torch.is_autocast_enabled(device) or is_sharded(model):
        yield
        return
    try:
        with torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=True):
            yield
    finally:
        torch.clear_autocast_cache()


def _of_rows(sampling: Sampling | Sequence[Sampling], rows: Tensor) -> Sampling | Sequence[Sampling]:
    return sampling if isinstance(sampling, Sampling) else [sampling[row] for row in rows.tolist()]


def _uniforms_of_rows(uniforms: Uniforms, rows: Tensor, position: int) -> Tensor:
    return uniforms(position)[rows]


class Drawn(NamedTuple):
    """Tokens drawn from logits."""

    tokens: Tensor  # Long [batch]
    logprobs: Tensor  # [batch] under the distribution that was drawn from; 0 if greedy
    finite: Tensor  # Bool []: the largest logit of each row is finite; if False, the tokens have no meaning


def choose(logits: Tensor, sampling: Sampling | Sequence[Sampling], uniform: Tensor) -> Drawn:
    """Tokens drawn from ``logits`` [batch, vocabulary] by the numbers ``uniform`` [batch] in [0, 1).

    ``sampling`` is one for all rows, or one for each. Of tokens with equal logits, ``top_k`` keeps the first.
    """
    if not isinstance(sampling, Sampling):
        return _choose_each(logits, sampling, uniform)
    finite = logits.amax(-1).isfinite().all()  # the maximum of a row with a NaN is NaN
    if sampling.temperature == 0 or sampling.top_k == 1:
        return Drawn(logits.argmax(-1), torch.zeros_like(logits[:, 0]), finite)
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        kept = logits.sort(dim=-1, descending=True, stable=True).indices[:, : sampling.top_k]
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept, logits.gather(-1, kept))
    if sampling.top_p < 1:
        logits = _nucleus(logits, sampling.top_p)
    probabilities = logits.softmax(-1)
    tokens = inverse_cdf(probabilities, uniform).clamp(max=logits.shape[-1] - 1)  # NaN gives the id after the last
    return Drawn(tokens, probabilities.gather(-1, tokens[:, None]).squeeze(-1).log(), finite)


def _choose_each(logits: Tensor, sampling: Sequence[Sampling], uniform: Tensor) -> Drawn:
    """Rows with equal options are drawn together."""
    alike: dict[Sampling, list[int]] = {}
    for row, one in enumerate(sampling):
        alike.setdefault(replace(one, max_new_tokens=1), []).append(row)
    if len(alike) == 1:
        return choose(logits, sampling[0], uniform)
    tokens, logprobs = torch.empty_like(uniform, dtype=torch.long), torch.empty_like(uniform)
    finite = torch.ones((), dtype=torch.bool, device=logits.device)
    for one, numbers in alike.items():
        rows = torch.tensor(numbers, device=logits.device)
        tokens[rows], logprobs[rows], is_finite = choose(logits[rows], one, uniform[rows])
        finite = finite & is_finite
    return Drawn(tokens, logprobs, finite)


def inverse_cdf(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds ``uniform`` [batch]; never a token with probability 0."""
    cumulative = _cumsum(probabilities)
    if cumulative.is_cuda:  # by rounding, a parallel sum may decrease, and a token with probability 0 could be selected
        cumulative = cumulative.cummax(-1).values
    total = cumulative[:, -1:]
    # By rounding, u·total can reach total, beyond the last token. The next smaller number selects the last possible
    # token.
    target = torch.minimum(uniform[:, None].to(total.dtype) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


def addressed_uniforms(seed: int | Tensor, stream: int, rows: Tensor, start: int | Tensor = 0) -> Uniforms:
    """Uniform random numbers with addresses: one for each (seed, stream, row, position).

    ``stream`` is the iteration; ``rows`` Long [batch] are global row numbers. The same address always gives the same
    number, on any device, in any order, in any number of processes. If rows joined a batch one after another,
    ``seed`` and ``start`` (each row's first position) are Long [batch].
    """
    base = _mix(_mix(_mix(torch.as_tensor(seed)) ^ stream) ^ rows.cpu())

    def uniforms(position: int) -> Tensor:
        return (_shift(_mix(base ^ (position - start)), 40)).to(torch.float32) / 2**24

    return uniforms


def generator_uniforms(generator: torch.Generator, batch: int) -> Uniforms:
    """Uniform random numbers drawn from ``generator``, for a chat, where tokens need no addresses."""
    return lambda _: torch.rand(batch, generator=generator)


def _cumsum(probabilities: Tensor) -> Tensor:
    """Cumulative sums [batch, vocabulary], also under ``torch.use_deterministic_algorithms``.

    PyTorch has no deterministic float ``cumsum`` on CUDA and raises there. Its result is used for a comparison with a
    random number only, so the check is disabled for this operation.
    """
    if not (probabilities.is_cuda and torch.are_deterministic_algorithms_enabled()):
        return probabilities.cumsum(-1)
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        return probabilities.cumsum(-1)
    finally:
        torch.use_deterministic_algorithms(True, warn_only=warn_only)


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Keeps the smallest set of most likely tokens whose probability is at least ``top_p`` (Holtzman et al. 2020)."""
    ordered, order = logits.sort(-1, descending=True)
    left_out = _cumsum(ordered.softmax(-1)) - ordered.softmax(-1) >= top_p
    left_out[..., 0] = False  # a very small top_p may be 0 in float32
    return logits.masked_fill(torch.zeros_like(left_out).scatter(-1, order, left_out), -torch.inf)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele et al. 2014) on int64, whose products wrap as they should."""
    x = x - 0x61C8864680B583EB  # the golden gamma 0x9E3779B97F4A7C15, as a signed number
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift right; int64's own copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
