"""What must be 0 up to rounding in an iteration of PPO, as pure functions of tensors.

Each function recomputes a result in another way than the code that it checks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlchat.conversation import Conversation, Message
from rlchat.ppo.advantages import Reduce
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer


def largest(x: Tensor) -> float:
    """The largest absolute value in ``x``; 0 if it is empty, NaN if it has a NaN."""
    return float(x.abs().max()) if x.numel() else 0.0


def reward_residual(rewards: Tensor, scores: Tensor, kl: Tensor, response_index: Tensor, kl_coef: float) -> float:
    """How far the per-token ``rewards`` are from -kl_coef · KL, plus the score on the last token of each response.

    Args:
        rewards: [B, R].
        scores: [N].
        kl: [B, R], the KL estimate of each token.
        response_index: Long [B, R], the number of the response that a token belongs to; -1 for no response.
        kl_coef: the KL coefficient.

    Returns:
        The largest error, relative to the largest score if that is above 1.
    """
    numbers = response_index[response_index >= 0]  # the tokens of a response are adjacent
    score = (rewards + kl_coef * kl)[response_index >= 0]
    outside = rewards[response_index < 0]
    if not len(numbers):
        return largest(outside)
    is_last = torch.cat([numbers[1:] != numbers[:-1], torch.ones_like(numbers[:1], dtype=torch.bool)])
    expected = torch.where(is_last, scores.to(score.dtype)[numbers], 0.0)
    return max(largest(score - expected), largest(outside)) / max(1.0, largest(scores))


# The type of integers with a number of bytes.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def return_residual(returns: Tensor, values: Tensor, rewards: Tensor, mask: Tensor, gamma: float, lam: float) -> float:
    """How far the rewards that GAE's ``returns`` imply are from ``rewards``.

    With A = returns - V, each token satisfies r + γ·V_next - V = A - γλ·A_next. *Next* is the next token in the mask of
    the same row; after the last, V and A are 0. Nothing is summed up, so an error shows at the token where it is made.

    Args:
        returns: [B, R].
        values: V [B, R].
        rewards: r [B, R].
        mask: Bool [B, R].
        gamma: γ.
        lam: λ.

    Returns:
        The largest error, relative to the largest return or value if that is above 1.
    """
    row = torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)[mask]
    if not len(row):
        return 0.0
    same_row = torch.cat([row[1:] == row[:-1], torch.zeros_like(row[:1], dtype=torch.bool)])

    def following(x: Tensor) -> Tensor:
        return torch.where(same_row, x.roll(-1), 0.0)

    value, advantage = values[mask], (returns - values)[mask]
    implied = advantage - gamma * lam * following(advantage) + value - gamma * following(value)
    return largest(implied - rewards[mask]) / max(1.0, largest(returns[mask]), largest(value))


def whitening_residual(advantages: Tensor, raw: Tensor, mask: Tensor, reduce: Reduce) -> float:
    """How far ``advantages`` are from mean 0 and variance 1 in ``mask``, and from 0 outside; all [B, R].

    If the advantages before whitening (``raw``) hardly vary, only the mean and the outside count.
    """
    count = reduce(mask.sum()).clamp(min=1)

    def moments(x: Tensor) -> tuple[float, float]:
        inside = torch.where(mask, x, 0.0)
        mean = reduce(inside.sum()) / count
        return float(mean), float(reduce((torch.where(mask, inside - mean, 0.0) ** 2).sum()) / count)

    mean, variance = moments(advantages)
    _, raw_variance = moments(raw)  # whitening adds 1e-8 to it
    spread = abs(variance - raw_variance / (raw_variance + 1e-8))
    return max(abs(mean), spread if raw_variance > 1e-6 else 0.0, largest(advantages[~mask]))


def group_residual(advantages: Tensor, mask: Tensor, group_size: int) -> float:
    """How far advantages [B, R] are from one number per response, whose sum over a group of responses is 0."""
    count = mask.sum(1).clamp(min=1)
    inside = torch.where(mask, advantages, 0.0)
    mean = inside.sum(1) / count
    uneven = torch.where(mask, advantages - mean[:, None], 0.0)
    sums = mean.view(-1, group_size).sum(1) / group_size
    return max(largest(uneven), largest(sums), largest(advantages[~mask])) / max(1.0, largest(inside))


def broken_responses(
    token_ids: Tensor, numbers: Tensor, lengths: Sequence[int], ended: Sequence[bool], end_id: int, most: int
) -> int:
    """How many responses do not have their tokens: the end token at the end if they ended, and nowhere else.

    Args:
        token_ids: Long [tokens], all sampled tokens, response by response.
        numbers: Long [tokens], the number of the response that each belongs to.
        lengths: [N] the number of tokens that were sampled for each response.
        ended: [N] whether it ended with the end token.
        end_id: the id of the end token.
        most: the maximum number of tokens of a response.
    """
    count = len(lengths)
    if len(token_ids) != len(numbers):
        return count
    sizes = torch.tensor(lengths, dtype=torch.long, device=numbers.device)
    has_ended = torch.tensor(ended, dtype=torch.bool, device=numbers.device)
    broken = (numbers.bincount(minlength=count) != sizes) | (sizes > most)
    if len(numbers):
        is_last = torch.cat([numbers[1:] != numbers[:-1], torch.ones_like(numbers[:1], dtype=torch.bool)])
        wrong = (token_ids == end_id) != (is_last & has_ended[numbers])
        broken = broken | (numbers[wrong].bincount(minlength=count) > 0)
    return int(broken.sum())


def prompt_header(tokenizer: ChatTokenizer) -> list[int]:
    """The last ids of every prompt, at most two: those that two prompts of different text have in common."""
    one, other = (tokenizer.render_prompt(Conversation((Message("user", text),))).ids for text in ("a", "No."))
    header: list[int] = []
    for x, y in zip(reversed(one[-2:]), reversed(other[-2:]), strict=True):
        if x != y:
            break
        header.insert(0, x)
    return header


def broken_prompts(ids: Tensor, sampled: Tensor, header: Sequence[int]) -> int:
    """How many responses do not directly follow ``header``, the last ids of every prompt.

    Args:
        ids: Long [B, T].
        sampled: Bool [B, T], True where a token was sampled.
        header: the ids that start an assistant message.
    """
    before = torch.cat([torch.zeros_like(sampled[:, :1]), sampled[:, :-1]], 1)
    rows, columns = (sampled & ~before).nonzero(as_tuple=True)
    wrong = torch.zeros_like(rows, dtype=torch.bool)
    for back, token in enumerate(reversed(header), start=1):
        wrong |= (columns < back) | (ids[rows, (columns - back).clamp(min=0)] != token)
    return int(wrong.sum())


def fingerprint(network: nn.Module, trained_only: bool = False) -> list[int]:
    """A number for each parameter of ``network`` (of this process's shard), which shows that it has changed.

    It is the sum of the bits of its values as integers, which does not depend on the order of the summation, and so not
    on the number of threads.
    """
    parameters: Iterable[Any] = (p for p in network.parameters() if p.requires_grad or not trained_only)
    local = (getattr(p, "to_local", lambda p=p: p)().detach() for p in parameters)
    sums = [p.view(_INTEGERS[p.element_size()]).sum(dtype=torch.int64) for p in local]
    return [int(x) for x in torch.stack(sums).tolist()] if sums else []


def shared_parameters(trained: nn.Module, other: nn.Module) -> int:
    """How many parameters of ``other`` are in the memory of a parameter of ``trained`` that requires a gradient."""

    def address(p: Any) -> int:
        return int(getattr(p, "to_local", lambda: p)().untyped_storage().data_ptr())

    changing = {address(p) for p in trained.parameters() if p.requires_grad} - {0}
    return sum(address(p) in changing for p in other.parameters())
