"""Log-probs, entropies and hits of given tokens, and their gradient, without several [tokens, vocabulary] tensors.

The policy head is by far the widest layer. Written with plain operations, it keeps several tensors of the size
[tokens, vocabulary] for the backward pass. Here, logits are computed for a block of the vocabulary at a time, which
stays in the cache. The exponentials of the first blocks are kept for the backward pass, up to a limit (1.12 to 1.14
times as fast as to keep the logits); it computes those of the other blocks again.

With logits l, p = softmax(l), H = -Σ p log p, and the chosen token t:

    d log p_t / d l_i = [i = t] - p_i
    d H / d l_i       = -p_i (log p_i + H)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rlchat.models.base_models import LogitsForm

# Not -inf, so that 0 · log 0 in an entropy is 0 instead of NaN; finite at every temperature that Sampling accepts.
UNSAYABLE_LOGIT = -1e30

# The number of logits in a block. On a CPU, 2 MiB stay in the cache; a GPU needs larger products to be busy.
_CPU_BLOCK = 2**19
_GPU_BLOCK = 2**26
_MIN_BLOCK_WIDTH = 256

# The most numbers that are kept for the backward pass, which is faster than to compute them again: 256 MiB on a CPU,
# and 1 GiB on a GPU, where the update of GPT-2 in 4 minibatches of 4,096 tokens is 1.06 times as fast with them.
_CPU_KEPT_LOGITS = 2**26
_GPU_KEPT_LOGITS = 2**28


class TokenStats(NamedTuple):
    """Statistics of given tokens under the policy; each [tokens], float32."""

    logprobs: Tensor  # log-probability of the token, in nats
    entropy: Tensor  # of the distribution over the token, in nats
    correct: Tensor  # 1 where no token is more likely; without a gradient


class Head(NamedTuple):
    """How logits are computed from hidden states."""

    weight: Tensor  # [vocabulary, hidden]
    bias: Tensor | None  # [vocabulary]
    form: LogitsForm
    unsayable: Tensor  # Bool [vocabulary]: True for the ids that have probability 0
    temperature: float


def token_stats(hidden: Tensor, targets: Tensor, head: Head) -> TokenStats:
    """Statistics of ``targets`` Long [tokens], each following ``hidden`` [tokens, hidden], with gradients.

    All results are float32, also under autocast; see :func:`float32_products` for the precision of the products.
    """
    return TokenStats(*_TokenStats.apply(hidden, head.weight, head.bias, targets, head))


def silence_(logits: Tensor, unsayable: Tensor) -> Tensor:
    """Overwrites the columns of ``logits`` [..., vocabulary] that are True in ``unsayable`` Bool [vocabulary].

    They are few. On a CPU, ``masked_fill_`` would take a third of the time of decoding a step.
    """
    if logits.is_cuda:  # only the GPU knows which columns these are, and asking means waiting
        return logits.masked_fill_(unsayable, UNSAYABLE_LOGIT)
    columns = unsayable.nonzero().squeeze(1)
    return logits.index_fill_(-1, columns, UNSAYABLE_LOGIT) if len(columns) else logits


def is_lower_precision(weight: Tensor) -> bool:
    """Whether the backbone below a head with this weight computes in bfloat16 or float16."""
    return weight.dtype != torch.float32 or torch.is_autocast_enabled(weight.device.type)


@contextmanager
def float32_products(device: torch.device, lower_backbone: bool) -> Iterator[None]:
    """Matrix products of float32 tensors return float32, also under autocast.

    With bfloat16 results, log-probs would be off by up to 0.25. Where the backbone computes in lower precision, a GPU
    rounds the factors of a product to TF32 (11 significant bits, bfloat16 has 8) and adds up in float32, which is
    several times as fast.
    """
    with torch.autocast(device.type, enabled=False):
        if device.type == "cuda" and lower_backbone:
            with cuda_products("high"):
                yield
        else:
            yield


@contextmanager
def cuda_products(precision: Literal["high", "highest"]) -> Iterator[None]:
    """Products of float32 tensors on CUDA use TF32 (high) or float32 (highest) in the context."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # the program uses PyTorch's newer switch, which cannot be mixed with the older one
        matmul: Any = torch.backends.cuda.matmul
        newer = matmul.fp32_precision
        matmul.fp32_precision = "tf32" if precision == "high" else "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = newer
        return
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: Head
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.lower = is_lower_precision(weight)
        columns_of_blocks = _columns(hidden, weight)
        most_kept = _CPU_KEPT_LOGITS if hidden.device.type == "cpu" else _GPU_KEPT_LOGITS
        # The slope of capped logits depends on the logits, which are not kept.
        keeps = any(ctx.needs_input_grad) and head.form.cap is None
        fitting = [c.stop for c in columns_of_blocks if keeps and c.stop * len(targets) <= most_kept]
        # One tensor for all that is kept, which goes back to the operating system as a whole.
        store = hidden.new_empty(len(targets) * max(fitting, default=0), dtype=torch.float32)
        highest_of_blocks: list[Tensor] = []  # of the kept ones
        # Of the blocks so far: the highest logit h, Σ exp(l - h) and Σ exp(l - h) (l - h); all [tokens].
        highest = torch.full((len(targets),), UNSAYABLE_LOGIT, dtype=torch.float32, device=hidden.device)
        total, weighted, chosen = torch.zeros_like(highest), torch.zeros_like(highest), torch.zeros_like(highest)
        memory = hidden.new_empty(0, dtype=torch.float32)
        with float32_products(hidden.device, ctx.lower):
            for columns, logits in _blocks(hidden, head, columns_of_blocks, store):
                place, inside = _places(targets, columns)
                chosen = torch.where(inside, logits.gather(1, place[:, None]).squeeze(1), chosen)
                before, highest = highest, torch.maximum(highest, logits.amax(1))
                step = before - highest
                memory = memory if memory.numel() else torch.empty_like(logits)  # the first block is the widest
                shifted = torch.sub(logits, highest[:, None], out=_part(memory, logits.shape))
                weights = torch.exp(shifted, out=logits)
                weighted = step.exp() * (weighted + step * total) + torch.linalg.vecdot(weights, shifted)
                total = step.exp() * total + weights.sum(1)
                if len(highest_of_blocks) < len(fitting):
                    highest_of_blocks.append(highest)
        log = total.log()
        log_total, entropy = highest + log, log - weighted / total
        correct = (chosen >= highest).float()
        ctx.save_for_backward(hidden, weight, bias, targets, log_total, entropy, store, *highest_of_blocks)
        ctx.head = head
        ctx.mark_non_differentiable(correct)
        ctx.set_materialize_grads(False)
        return chosen - highest - log, entropy, correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_logprobs: Tensor | None, of_entropy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, log_total, entropy, store, *highest_of_blocks = ctx.saved_tensors
        head: Head = ctx.head._replace(weight=weight, bias=bias)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        if of_logprobs is None:
            of_logprobs = torch.zeros_like(entropy)
        # An unsayable logit is a constant.
        of_chosen = of_logprobs.masked_fill(head.unsayable[targets], 0.0)
        hidden32 = hidden.float()
        to_hidden = torch.zeros_like(hidden32) if need_hidden else None
        to_weight = torch.empty_like(weight, dtype=torch.float32) if need_weight else None
        to_bias = torch.empty_like(bias, dtype=torch.float32) if need_bias else None
        with float32_products(hidden.device, ctx.lower):
            kept = _kept_blocks(hidden, head, log_total, store, highest_of_blocks)
            blocks = chain(kept, _new_blocks(hidden, head, log_total, after=len(highest_of_blocks)))
            for columns, weights, log_factor, slope in blocks:  # log p = log weights + log_factor
                factor = log_factor.exp()
                gradient = weights * (-of_logprobs * factor)[:, None]
                if of_entropy is not None:
                    of_p = weights * (-of_entropy * factor * (log_factor + entropy))[:, None]
                    of_log = torch.special.xlogy(weights, weights).mul_((-of_entropy * factor)[:, None])
                    gradient += of_p.add_(of_log)
                place, inside = _places(targets, columns)
                gradient.scatter_add_(1, place[:, None], torch.where(inside, of_chosen, 0.0)[:, None])
                if isinstance(slope, Tensor):  # infinite where the logit is unsayable
                    gradient.mul_(slope).masked_fill_(head.unsayable[columns], 0.0)
                elif slope != 1:
                    gradient.mul_(slope)
                if to_hidden is not None:
                    to_hidden.addmm_(gradient, weight[columns].float())
                if to_weight is not None:
                    torch.mm(gradient.T, hidden32, out=to_weight[columns])
                if to_bias is not None:
                    torch.sum(gradient, 0, out=to_bias[columns])
        return (
            None if to_hidden is None else to_hidden.to(hidden.dtype),
            None if to_weight is None else to_weight.to(weight.dtype),
            None if to_bias is None else to_bias.to(bias.dtype),
            None,
            None,
        )


Block = tuple[slice, Tensor, Tensor, Tensor | float]
"""Ids, weights [tokens, block], log_factor [tokens] and slope of a block's logits; p = weights · exp(log_factor)."""


def _kept_blocks(
    hidden: Tensor, head: Head, log_total: Tensor, store: Tensor, highest_of_blocks: list[Tensor]
) -> Iterator[Block]:
    """Blocks for the backward pass, from what the forward pass kept: the first ones, one after another in ``store``."""
    slope = head.form.slope(log_total, head.temperature)
    for columns, highest in zip(_columns(hidden, head.weight), highest_of_blocks, strict=False):
        weights = store[len(hidden) * columns.start : len(hidden) * columns.stop].view(len(hidden), -1)
        yield columns, weights, highest - log_total, slope


def _new_blocks(hidden: Tensor, head: Head, log_total: Tensor, after: int) -> Iterator[Block]:
    """Blocks for the backward pass, computed again, without the first ``after``."""
    for columns, logits in _blocks(hidden, head, _columns(hidden, head.weight)[after:]):
        slope = head.form.slope(logits, head.temperature)
        yield columns, logits.sub_(log_total[:, None]).exp_(), torch.zeros_like(log_total), slope


def _part(memory: Tensor, shape: torch.Size) -> Tensor:
    """A tensor of ``shape`` in ``memory``."""
    return memory.view(-1)[: shape.numel()].view(shape)


def _columns(hidden: Tensor, weight: Tensor) -> list[slice]:
    """The ids of each block of the vocabulary."""
    logits = _CPU_BLOCK if hidden.device.type == "cpu" else _GPU_BLOCK
    width = max(_MIN_BLOCK_WIDTH, logits // max(1, len(hidden)))
    return [slice(start, min(start + width, len(weight))) for start in range(0, len(weight), width)]


def _blocks(
    hidden: Tensor, head: Head, columns: Sequence[slice], store: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of the vocabulary, with their logits [tokens, block] in float32 at the temperature of ``head``.

    Each block overwrites the one before, except for the first ones, which fill ``store`` one after another.

    Example: with 2 tokens, blocks of 3 ids and a store of 12 numbers, ids 0 to 2 are in store[0:6], ids 3 to 5 in
    store[6:12], and the logits of ids 6 to 8 overwrite each other's memory with those of ids 9 to 11.
    """
    hidden, weight = hidden.detach().float(), head.weight.detach()
    memory = hidden.new_empty(0)
    for ids in columns:
        rows = weight[ids].float()
        shape = torch.Size((len(hidden), len(rows)))
        if store is not None and len(hidden) * ids.stop <= len(store):
            out = store[len(hidden) * ids.start : len(hidden) * ids.stop].view(shape)
        else:  # the first block is the widest
            memory = memory if memory.numel() else hidden.new_empty(shape.numel())
            out = _part(memory, shape)
        logits = torch.mm(hidden, rows.T, out=out)
        if head.bias is not None:
            logits.add_(head.bias[ids].detach().float())
        silence_(head.form.apply_(logits), head.unsayable[ids])
        if head.temperature != 1:
            logits.div_(head.temperature)
        yield ids, logits


def _places(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """The column of each of ``targets`` in a block (any column if it is not there), and whether it is there."""
    inside = (targets >= columns.start) & (targets < columns.stop)
    return torch.where(inside, targets - columns.start, 0), inside
