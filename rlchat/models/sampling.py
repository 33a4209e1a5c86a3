"""`sample()`: the only token loop in the program. Rollouts, validation, chat and serving all come through here."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rlchat.models.kv_cache import Cache, append_rows, can_append, drop_columns, keep_rows
from rlchat.models.networks import RLChatModel
from rlchat.utils.padding import pad

Uniforms = Callable[[int], Tensor]
"""Position in the reply → one number in [0, 1) for each row, [batch]: all the randomness that sampling uses."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn.

    ``temperature`` 0 takes the likeliest token. ``top_k`` 0 and ``top_p`` 1 leave the distribution whole, as rollouts
    need it: the policy's log-probs are those of the distribution that was sampled.
    """

    max_new_tokens: int = 100
    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        # Beyond these, float32 logits overflow to NaN, or what has no probability gets some.
        if self.temperature != 0 and not 1e-6 <= self.temperature <= 1e6:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or from 1e-6 to 1e6")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"top_k is {self.top_k} and top_p {self.top_p}; they must be >= 0 and in (0, 1]")


class Step(NamedTuple):
    """One token of every row."""

    tokens: Tensor  # Long [batch]
    logprobs: Tensor  # [batch] of the distribution that was drawn from; 0 where greedy


@dataclass(frozen=True, slots=True)
class Change:
    """Who leaves a batch and who joins it between two tokens; what the caller of :func:`sample` may send for a step.

    ``sampling`` and ``uniforms`` are those of the new batch: the rows that stay, then the rows that join. Positions go
    on counting from the first token of the batch.
    """

    keep: Sequence[int]  # the rows that stay, by their number in the batch as it was
    prompts: Sequence[Sequence[int]]  # the rows that join: ids, two or more each
    sampling: Sequence[Sampling]
    uniforms: Uniforms


@dataclass(frozen=True, slots=True)
class Generated:
    """Sampled replies. ``mask`` is True where a token was sampled, the end marker included."""

    ids: Tensor  # Long [batch, reply], padding where mask is False
    mask: Tensor  # Bool [batch, reply]
    ended: Tensor  # Bool [batch]: the reply closed its turn; False where it ran out of tokens
    logprobs: Tensor  # [batch, reply] of the distributions that were drawn from; 0 where mask is False


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
) -> Generator[Step, Change | None, None]:
    """Yields the next token of every row until each has ended or its ``max_new_tokens`` are out.

    ``ids`` [batch, prompt] are left-padded prompts, ``attention_mask`` True on their real tokens. ``sampling`` is one
    for all rows, or one for each. A row that has ended yields ``pad_id``. The caller may stop at any token. The model
    should be in eval mode: dropout would sample from another distribution than the one that is trained. ``goes_on``
    says of the rows that are ``alive`` [batch] whether there is another step; processes that hold a model in shards
    have to agree on it.

    A server keeps one batch going for ever: ``send(change)`` instead of the next step takes rows out and lets others
    join. A row says the same whoever sits beside it, and whenever it came.

    ``cache`` holds what stands before ``ids``, and ``attention_mask`` covers that too: [batch, cached + prompt]. It
    grows by ``ids`` and by every token that was yielded, but for the last. None: nothing stands before them.
    """
    cache = model.backbone.new_cache() if cache is None else cache
    alive = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    step, mask, ends = ids, attention_mask, _ends(sampling, len(ids), 0).to(ids.device)
    for position in itertools.count():
        hidden = model(step, mask, cache)[:, -1]
        drawn = choose(model.logits(hidden), sampling, uniforms(position).to(ids.device))
        token = torch.where(alive, drawn.tokens, pad_id)
        change = yield Step(token, torch.where(alive, drawn.logprobs, 0.0))
        # A finished row goes on as padding, unseen by itself: its positions and the others' stay as they are.
        mask = torch.cat([mask, alive[:, None]], 1)
        alive = alive & (token != end_id) & (position + 1 < ends)
        step = token[:, None]
        if change is not None:
            sampling, uniforms = change.sampling, change.uniforms
            joining, keep = len(change.prompts), torch.tensor(change.keep, dtype=torch.long, device=ids.device)
            step, mask = _change_rows(model, cache, step, mask, keep, change.prompts, pad_id)
            alive = torch.cat([alive[keep], alive.new_ones(joining)])
            ends = torch.cat([ends[keep], _ends(sampling[len(keep) :], joining, position + 1).to(ids.device)])
        if not goes_on(alive):
            return


def _ends(sampling: Sampling | Sequence[Sampling], rows: int, position: int) -> Tensor:
    """Long [rows]: the positions that rows which begin at ``position`` do not reach."""
    each = [sampling] * rows if isinstance(sampling, Sampling) else sampling
    return torch.tensor([position + one.max_new_tokens for one in each], dtype=torch.long)


def _change_rows(
    model: RLChatModel,
    cache: Cache,
    step: Tensor,
    mask: Tensor,
    keep: Tensor,
    prompts: Sequence[Sequence[int]],
    pad_id: int,
) -> tuple[Tensor, Tensor]:
    """Brings ``cache`` to the new batch; returns its next tokens [batch, 1] and its mask [batch, columns + 1].

    The prompts that join are read up to their last token, which is the next that their rows see. Raises ValueError for
    a backbone whose cache cannot take them in.
    """
    keep_rows(cache, keep)
    step, mask = step[keep], mask[keep]
    if not can_append(cache):
        if prompts:
            raise ValueError("the cache of this backbone takes no rows in; let the batch end first")
        return step, mask
    if prompts:
        ids, theirs = (rows.to(step.device) for rows in pad(prompts, pad_id, "left"))
        read = model.backbone.new_cache()
        model(ids[:, :-1], theirs[:, :-1], read)
        append_rows(cache, read)
        width = max(mask.shape[1], theirs.shape[1])
        step = torch.cat([step, ids[:, -1:]])
        mask = torch.cat([F.pad(part, (width - part.shape[1], 0)) for part in (mask, theirs)])
    unused = int(mask.any(0).int().argmax())  # columns that only those who left had filled
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
    """Whole replies to ``ids``: :func:`sample` to its end, collected."""
    steps = sample(model, ids, attention_mask, sampling, uniforms, end_id=end_id, pad_id=pad_id, goes_on=goes_on)
    tokens, logprobs = (torch.stack(column, dim=1) for column in zip(*steps, strict=True))
    return Generated(ids=tokens, mask=tokens != pad_id, ended=(tokens == end_id).any(1), logprobs=logprobs)


def choose(logits: Tensor, sampling: Sampling | Sequence[Sampling], uniform: Tensor) -> Step:
    """Tokens drawn from ``logits`` [batch, vocabulary] by the numbers ``uniform`` [batch] in [0, 1).

    ``sampling`` is one for all rows, or one for each.
    """
    if not isinstance(sampling, Sampling):
        return _choose_each(logits, sampling, uniform)
    if sampling.temperature == 0:
        return Step(logits.argmax(-1), torch.zeros_like(logits[:, 0]))
    logits = logits / sampling.temperature
    if sampling.top_k:
        worst_kept = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < worst_kept, -torch.inf)
    if sampling.top_p < 1:
        logits = _nucleus(logits, sampling.top_p)
    probabilities = logits.softmax(-1)
    tokens = inverse_cdf(probabilities, uniform)
    return Step(tokens, probabilities.gather(-1, tokens[:, None]).squeeze(-1).log())


def _choose_each(logits: Tensor, sampling: Sequence[Sampling], uniform: Tensor) -> Step:
    """Rows that are drawn alike are drawn together: in a crowd most are."""
    alike: dict[Sampling, list[int]] = {}
    for row, one in enumerate(sampling):
        alike.setdefault(replace(one, max_new_tokens=1), []).append(row)
    if len(alike) == 1:
        return choose(logits, sampling[0], uniform)
    tokens, logprobs = torch.empty_like(uniform, dtype=torch.long), torch.empty_like(uniform)
    for one, numbers in alike.items():
        rows = torch.tensor(numbers, device=logits.device)
        tokens[rows], logprobs[rows] = choose(logits[rows], one, uniform[rows])
    return Step(tokens, logprobs)


def inverse_cdf(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The first token at which the cumulative probability passes ``uniform`` [batch]; never one of probability 0."""
    cumulative = probabilities.cumsum(-1)
    if cumulative.is_cuda:  # a parallel sum may dip by a rounding, and at a dip a token of probability 0 could be hit
        cumulative = cumulative.cummax(-1).values
    total = cumulative[:, -1:]
    # Rounding can bring u·total up to total, past every token; just below it is the last token that has probability.
    target = torch.minimum(uniform[:, None].to(total.dtype) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


def addressed_uniforms(seed: int | Tensor, stream: int, rows: Tensor, start: int | Tensor = 0) -> Uniforms:
    """Noise that is looked up, not consumed: a number for each (seed, stream, row, position).

    ``stream`` is the iteration; ``rows`` Long [batch] are global row numbers. Whoever asks for the same address gets
    the same number, on any device, in any order, in any number of processes. Where rows came into a batch one after
    the other, ``seed`` and ``start``, the position that is each one's first, are Long [batch].
    """
    base = _mix(_mix(_mix(torch.as_tensor(seed)) ^ stream) ^ rows.cpu())

    def uniforms(position: int) -> Tensor:
        return (_shift(_mix(base ^ (position - start)), 40)).to(torch.float32) / 2**24

    return uniforms


def generator_uniforms(generator: torch.Generator, batch: int) -> Uniforms:
    """Noise drawn from ``generator``, for a chat in which nobody needs the same words again."""
    return lambda _: torch.rand(batch, generator=generator)


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Keeps the likeliest tokens that together have at least ``top_p`` (Holtzman et al. 2020)."""
    ordered, order = logits.sort(-1, descending=True)
    left_out = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1) >= top_p
    left_out[..., 0] = False  # however small top_p is: as float32 it may be 0
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
