"""Log-probs of tokens for the API: those of sampled tokens, and those of a given text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from pydantic import BaseModel
from torch import Tensor

from rlchat.models.networks import RLChatModel
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

MAX_TOP = 20  # as in OpenAI's API
_SMALLEST = -9999.0  # JSON has no infinity; this is OpenAI's value for "very unlikely"
_POSITIONS_AT_A_TIME = 256  # limits the memory of the logits [positions, vocabulary]


class TokenLogprob(NamedTuple):
    """A token and its log-prob under the model, before temperature, top_k and top_p; ``top`` are the most likely."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class TopLogprob(BaseModel):
    """A token, its bytes and its log-prob."""

    token: str
    bytes: list[int]
    logprob: float


class ContentLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    """The log-probs of the tokens of a response, without its end marker."""

    content: list[ContentLogprob]
    refusal: None = None


def token_logprobs(logits: Tensor, tokens: Tensor, top: int) -> list[TokenLogprob]:
    """The log-probs of ``tokens`` Long [rows] under ``logits`` [rows, vocabulary], and of the ``top`` most likely."""
    table = logits.float().log_softmax(-1).clamp_min(_SMALLEST)
    chosen = table.gather(-1, tokens.to(table.device)[:, None]).squeeze(-1).tolist()
    best = table.topk(min(top, table.shape[-1]), dim=-1)
    tops = [
        tuple(zip(ids, values, strict=True))
        for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    return [TokenLogprob(*one) for one in zip(tokens.tolist(), chosen, tops, strict=True)]


@torch.no_grad()
def prompt_logprobs(model: RLChatModel, ids: Sequence[int], top: int) -> list[TokenLogprob]:
    """The log-prob of each of ``ids`` after the ones before it, from the second on: ``len(ids) - 1`` of them."""
    row = torch.tensor([list(ids)], device=model.backbone.head_weight.device)
    hidden = model(row, torch.ones_like(row, dtype=torch.bool))[0, :-1]
    found: list[TokenLogprob] = []
    for chunk, targets in zip(hidden.split(_POSITIONS_AT_A_TIME), row[0, 1:].split(_POSITIONS_AT_A_TIME), strict=True):
        found += token_logprobs(model.logits(chunk), targets, top)
    return found


def token_text(tokenizer: ChatTokenizer, token: int) -> str:
    """A unique name for ``token``: its text, or for example ``bytes:\\xe2`` for a part of a character."""
    raw = tokenizer.token_bytes(token)
    if not raw:
        return tokenizer.token_name(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
