"""Log-probs, entropies and hits of given tokens, and their gradient, without a [tokens, vocabulary] tensor.

The policy head is by far the widest layer. Written with plain operations, it keeps several tensors of the size
[tokens, vocabulary] for the backward pass. Here, logits exist for a few tokens at a time, in one buffer, and the
backward pass computes them again.

With logits l, p = softmax(l), H = -Σ p log p, and the chosen token t:

    d log p_t / d l_i = [i = t] - p_i
    d H / d l_i       = -p_i (log p_i + H)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlchat.models.base_models import LogitsForm

# Not -inf, so that 0 · log 0 in an entropy is 0 instead of NaN; finite at every temperature that Sampling accepts.
UNSAYABLE_LOGIT = -1e30

# Logits in memory at a time. On a CPU, 8 MiB stay in the cache; a GPU needs larger products to be busy.
_CPU_LOGITS_AT_A_TIME = 2**21
_GPU_LOGITS_AT_A_TIME = 2**26


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
    unsayable: Tensor  # Long: the ids that have probability 0
    temperature: float


def token_stats(hidden: Tensor, targets: Tensor, head: Head) -> TokenStats:
    """Statistics of ``targets`` Long [tokens], each following ``hidden`` [tokens, hidden], with gradients.

    All products are computed in float32, also under autocast; in bfloat16, log-probs would be off by up to 0.25.
    """
    return TokenStats(*_TokenStats.apply(hidden, head.weight, head.bias, targets, head))


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: Head
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens = len(targets)
        logprobs, entropy, log_total, correct = torch.empty(4, tokens, dtype=torch.float32, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for span, logits in _chunks(hidden, head):
                highest = logits.amax(1, keepdim=True)
                logits.sub_(highest)
                chosen = logits.gather(1, targets[span, None]).squeeze(1)
                weights = logits.exp()
                total = weights.sum(1)
                mean = torch.linalg.vecdot(weights, logits) / total  # of the shifted logits
                log = total.log()
                logprobs[span] = chosen - log
                entropy[span] = log - mean
                log_total[span] = log + highest.squeeze(1)
                correct[span] = chosen >= 0
        ctx.save_for_backward(hidden, weight, bias, targets, log_total, entropy)
        ctx.head = head
        ctx.mark_non_differentiable(correct)
        ctx.set_materialize_grads(False)
        return logprobs, entropy, correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_logprobs: Tensor | None, of_entropy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, log_total, entropy = ctx.saved_tensors
        head: Head = ctx.head._replace(weight=weight, bias=bias)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        if of_logprobs is None:
            of_logprobs = torch.zeros_like(entropy)
        hidden32, weight32 = hidden.float(), weight.float()
        to_hidden = torch.empty_like(hidden32) if need_hidden else None
        to_weight = torch.zeros_like(weight32) if need_weight else None
        to_bias = torch.zeros(len(weight), dtype=torch.float32, device=hidden.device) if need_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            for span, logits in _chunks(hidden, head):
                slope = head.form.slope(logits, head.temperature)
                logprobs = logits.sub_(log_total[span, None])
                gradient = _gradient_of_logits(
                    logprobs,
                    targets[span],
                    of_logprobs[span, None],
                    None if of_entropy is None else of_entropy[span, None],
                    entropy[span, None],
                )
                gradient.mul_(slope)
                gradient.index_fill_(1, head.unsayable, 0.0)
                if to_hidden is not None:
                    torch.mm(gradient, weight32, out=to_hidden[span])
                if to_weight is not None:
                    to_weight.addmm_(gradient.T, hidden32[span])
                if to_bias is not None:
                    to_bias.add_(gradient.sum(0))
        return (
            None if to_hidden is None else to_hidden.to(hidden.dtype),
            None if to_weight is None else to_weight.to(weight.dtype),
            None if to_bias is None else to_bias.to(bias.dtype),
            None,
            None,
        )


def _chunks(hidden: Tensor, head: Head) -> Iterator[tuple[slice, Tensor]]:
    """Spans of the tokens with their logits [chunk, vocabulary] in float32, at the temperature of ``head``.

    The logits are in a buffer that the next chunk overwrites.
    """
    weight = head.weight.detach().float()
    at_a_time = _CPU_LOGITS_AT_A_TIME if hidden.device.type == "cpu" else _GPU_LOGITS_AT_A_TIME
    rows = min(max(1, at_a_time // len(weight)), max(1, len(hidden)))
    buffer = torch.empty(rows, len(weight), dtype=torch.float32, device=hidden.device)
    for start in range(0, len(hidden), rows):
        part = hidden[start : start + rows].detach().float()
        logits = buffer[: len(part)]
        torch.mm(part, weight.T, out=logits)
        if head.bias is not None:
            logits.add_(head.bias.detach().float())
        head.form.apply_(logits).index_fill_(1, head.unsayable, UNSAYABLE_LOGIT)
        if head.temperature != 1:
            logits.div_(head.temperature)
        yield slice(start, start + len(part)), logits


def _gradient_of_logits(
    logprobs: Tensor, targets: Tensor, of_logprobs: Tensor, of_entropy: Tensor | None, entropy: Tensor
) -> Tensor:
    """The gradient [chunk, vocabulary] with respect to the logits, in the memory of ``logprobs``.

    The gradients with respect to the log-probs of ``targets`` and to the entropies, and the entropies, are [chunk, 1].
    """
    if of_entropy is None:
        gradient = logprobs.exp_().mul_(-of_logprobs)
    else:
        probabilities = logprobs.exp()
        gradient = logprobs.add_(entropy).mul_(of_entropy).add_(of_logprobs).mul_(probabilities).neg_()
    gradient[torch.arange(len(targets), device=targets.device), targets] += of_logprobs.squeeze(1)
    return gradient
