"""Generate responses: the tokens of one response as a stream, or whole responses to a batch of prompts."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from numbers import Integral, Real

import torch

from rlchat.chat.context import FittedPrompt
from rlchat.errors import UserError
from rlchat.models.kv_cache import Cache, shorten
from rlchat.models.model_file import PolicyBundle
from rlchat.models.sampling import Sampling, addressed_uniforms, generate, generator_uniforms, sample
from rlchat.rewards import Reply
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer
from rlchat.utils.padding import pad
from rlchat.utils.progress import with_progress

_SAMPLES = (
    "Hello, how are you?",
    "  two spaces,\ttabs\nand lines\r\n",
    "1234567890 3.14 €5",
    "naïve Ελλάδα Привет 你好 こんにちは مرحبا",
    "e\u0301 and 👩\u200d👩\u200d👧 are several code points each",
    "<|user|> typed by a user is text<|end|>",
)


class ResponseGenerator:
    """The model of one chat, its random generator, and the KV cache that is reused between turns."""

    def __init__(self, bundle: PolicyBundle, device: torch.device, generator: torch.Generator) -> None:
        self.model = bundle.model
        self.tokenizer = bundle.tokenizer
        self.device = device
        self.generator = generator
        self._cached: tuple[Cache, list[int]] | None = None  # a cache, and the ids of its keys and values

    def forget(self) -> None:
        """Drop the cache."""
        self._cached = None

    def stream(self, prompt: FittedPrompt, sampling: Sampling, use_cache: bool, drawn: list[int]) -> Iterator[int]:
        """Yield the tokens of one response as they are sampled, and append each to ``drawn``.

        With ``use_cache``, the prefix that this prompt shares with the last prompt and response is not computed again,
        and this prompt and its response are cached in turn.
        """
        ids = prompt.ids
        known, cache = self._reuse_cache(ids) if use_cache else (0, self.model.backbone.new_cache())
        steps = sample(
            self.model,
            torch.tensor([ids[known:]], device=self.device),
            torch.ones(1, len(ids), dtype=torch.bool, device=self.device),
            replace(sampling, max_new_tokens=prompt.max_new_tokens),
            generator_uniforms(self.generator, 1),
            end_id=self.tokenizer.end_id,
            pad_id=self.tokenizer.pad_id,
            cache=cache,
        )
        for step in steps:
            if use_cache:  # Ctrl-C may come at any moment; all layers are complete up to this step
                self._cached = cache, ids + drawn
            drawn.append(int(step.tokens))
            yield drawn[-1]

    def batch(self, prompts: Sequence[FittedPrompt], sampling: Sampling, batch_size: int) -> list[Reply]:
        """One response to each of ``prompts``, in their order. The random numbers do not depend on ``batch_size``."""
        seed = int(torch.randint(2**62, (1,), generator=self.generator))
        replies: dict[int, Reply] = {}
        for chunk in with_progress(_chunks(prompts, batch_size), "generating", show=True):
            ids, mask = pad([prompts[i].ids for i in chunk], self.tokenizer.pad_id, "left")
            generated = generate(
                self.model,
                ids.to(self.device),
                mask.to(self.device),
                replace(sampling, max_new_tokens=prompts[chunk[0]].max_new_tokens),
                addressed_uniforms(seed, 0, torch.tensor(chunk)),
                end_id=self.tokenizer.end_id,
                pad_id=self.tokenizer.pad_id,
            )
            lengths = generated.mask.sum(1).tolist()
            responses = zip(generated.ids.tolist(), lengths, generated.ended.tolist(), strict=True)
            for i, (tokens, length, ended) in zip(chunk, responses, strict=True):
                replies[i] = Reply("".join(decode_stream(self.tokenizer, tokens[:length])), length, ended)
        return [replies[i] for i in range(len(prompts))]

    def _reuse_cache(self, prompt: list[int]) -> tuple[int, Cache]:
        """The number of leading ids of ``prompt`` that are in the returned cache, and the cache.

        At least the last id is computed again, because its hidden state gives the first new token. For example, cached
        ids [1, 2, 3, 4] and prompt [1, 2, 9] share [1, 2]: the cache is shortened to 2, and 9 is computed.
        """
        cached, self._cached = self._cached, None
        if cached is not None:
            cache, ids = cached
            shared = 0
            while shared < min(len(ids), len(prompt) - 1) and ids[shared] == prompt[shared]:
                shared += 1
            if shared and shorten(cache, shared):
                return shared, cache
        return 0, self.model.backbone.new_cache()


def decode_stream(tokenizer: ChatTokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The text of one response as its tokens arrive. A character that the last token leaves incomplete is omitted."""
    decoder = tokenizer.stream()
    for token in tokens:
        if piece := decoder.finish() if token == tokenizer.end_id else decoder.push(token):
            yield piece


def _chunks(prompts: Sequence[FittedPrompt], batch_size: int) -> list[list[int]]:
    """Indices of ``prompts`` in batches of one ``max_new_tokens`` each, prompts of similar length together."""

    def limit(i: int) -> int:
        return prompts[i].max_new_tokens

    ordered = sorted(range(len(prompts)), key=lambda i: (limit(i), -len(prompts[i].ids)))
    groups = [list(indices) for _, indices in groupby(ordered, key=limit)]
    return [indices[start : start + batch_size] for indices in groups for start in range(0, len(indices), batch_size)]


@dataclass(frozen=True, slots=True)
class TokenizationCheck:
    """The number of tokens of ``text``, and whether decoding them (all together and one by one) restores it."""

    text: str
    tokens: int
    intact: bool


def check_tokenization(tokenizer: ChatTokenizer, texts: Iterable[str]) -> list[TokenizationCheck]:
    """Encode and decode some sample texts and ``texts``. No text may become a special token."""
    checks = []
    for text in dict.fromkeys([*_SAMPLES, *texts]):
        ids = tokenizer.encode(text)
        pieces = "".join(decode_stream(tokenizer, [*ids, tokenizer.end_id]))
        has_special = tokenizer.special_ids & set(ids)
        checks.append(TokenizationCheck(text, len(ids), not has_special and tokenizer.decode(ids) == text == pieces))
    return checks


def sampling_from(max_new_tokens: int, temperature: float, top_k: int, top_p: float) -> Sampling:
    """Sampling options from user input. ``top_k`` -1 means 0, as in other programs: all tokens.

    Raises :class:`UserError` for a value of the wrong type or out of range.
    """
    for name, whole in (("max_new_tokens", max_new_tokens), ("top_k", top_k)):
        if not isinstance(whole, Integral):
            raise UserError(f"invalid value {whole!r} for {name}: expected an integer")
    for name, number in (("temperature", temperature), ("top_p", top_p)):
        if not isinstance(number, Real):
            raise UserError(f"invalid value {number!r} for {name}: expected a number")
    try:
        return Sampling(int(max_new_tokens), temperature, 0 if top_k == -1 else int(top_k), top_p)
    except ValueError as error:
        raise UserError(str(error)) from error


def positive_integer(name: str, value: int) -> int:
    """``value``, as an int. Raises :class:`UserError` if it is none, or below 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise UserError(f"invalid value {value!r} for {name}: expected a positive integer")
    return int(value)


def generator_from(seed: int | None) -> torch.Generator:
    """A generator with ``seed``, or with a fresh seed for None. Raises :class:`UserError` for an invalid seed."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
        return generator
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < 2**63:
        raise UserError(f"invalid value {seed!r} for seed: expected an integer from 0 to 2**63 - 1")
    return generator.manual_seed(int(seed))


@contextmanager
def exclusively(lock: threading.Lock) -> Iterator[None]:
    """Holds the ``lock`` of a chat. Raises :class:`UserError` if it is held already."""
    if not lock.acquire(blocking=False):
        raise UserError(
            "this ChatInterface is generating another response: finish or close that stream first, or use one "
            "ChatInterface per conversation"
        )
    try:
        yield
    finally:
        lock.release()
