"""The responses to one request, passed from the engine's thread to the server's event loop."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from fastapi.concurrency import run_in_threadpool

from rlchat.chat.context import fit_prompt
from rlchat.models.sampling import Sampling
from rlchat.server.engine import Engine, EngineFullError, Piece, Ticket
from rlchat.server.errors import APIError
from rlchat.server.schemas import ChatRequest, Seen, Usage


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on one request."""

    max_body: int = 1_000_000  # bytes
    max_messages: int = 1_000
    max_tokens: int = 1_024  # per response
    max_seconds: float = 120.0  # from the request to the last token, and for the body to arrive


class Replies:
    """``n`` responses to a request in the engine's queue. Iterate over their pieces, or :meth:`cancel` them."""

    def __init__(self, prompt: list[int], seen: Seen, tickets: list[Ticket], queue: asyncio.Queue[tuple[int, Piece]]):
        self.prompt = prompt
        self.seen = seen
        self._tickets = tickets
        self._queue = queue
        self._tokens = [0] * len(tickets)

    @classmethod
    async def ask(cls, engine: Engine, max_length: int, request: ChatRequest, limits: Limits) -> Replies:
        """Queue ``request``. Raises :class:`APIError` if it exceeds a limit or the queue is full."""
        if len(request.messages) > limits.max_messages:
            raise APIError(
                400,
                f"messages: expected at most {limits.max_messages:,}, got {len(request.messages):,}",
                param="messages",
            )
        asked = request.max_completion_tokens or request.max_tokens
        if asked is not None:
            asked = min(asked, limits.max_tokens)
        fitted = await run_in_threadpool(fit_prompt, engine.tokenizer, request.conversation, max_length, asked)
        usual = Sampling()
        try:
            sampling = Sampling(
                min(fitted.max_new_tokens, limits.max_tokens),
                usual.temperature if request.temperature is None else request.temperature,
                max(request.top_k or 0, 0),  # -1 means 0
                request.top_p or usual.top_p,
            )
        except ValueError as error:
            raise APIError(400, str(error)) from error
        seen = Seen(
            dropped_messages=fitted.dropped_messages,
            cut_tokens=fitted.cut_tokens,
            dropped_system=fitted.dropped_system,
        )
        queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        seed = secrets.randbits(63) if request.seed is None else request.seed
        deadline = time.monotonic() + limits.max_seconds
        tickets = [
            Ticket(
                fitted.ids,
                sampling,
                _into(queue, choice),
                deadline,
                seed=seed,
                choice=choice,
                stop=request.stop_strings,
                streams=bool(request.stream),
            )
            for choice in range(request.n or 1)
        ]
        try:
            engine.submit(tickets)
        except EngineFullError as error:
            raise APIError(
                429, f"{error}: try again later", code="engine_full", headers={"Retry-After": "1"}
            ) from error
        return cls(fitted.ids, seen, tickets, queue)

    def __len__(self) -> int:
        return len(self._tickets)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        """The pieces as they arrive, with the index of their choice. Raises :class:`APIError` if generation fails."""
        left = len(self)
        while left:
            choice, piece = await self._queue.get()
            self._tokens[choice] = piece.tokens
            if piece.finish == "failed":
                raise APIError(500, "generation failed: see the server's log")
            if piece.finish == "expired":
                raise APIError(503, "the request timed out in the queue: try again later")
            left -= piece.finish is not None
            yield choice, piece

    @property
    def usage(self) -> Usage:
        """Token counts so far."""
        prompt, generated = len(self.prompt), sum(self._tokens)
        return Usage(prompt_tokens=prompt, completion_tokens=generated, total_tokens=prompt + generated)

    def cancel(self) -> None:
        """Stop generating them."""
        for ticket in self._tickets:
            ticket.cancelled = True


def _into(queue: asyncio.Queue[tuple[int, Piece]], choice: int) -> Callable[[Piece], None]:
    loop = asyncio.get_running_loop()

    def deliver(piece: Piece) -> None:
        if not loop.is_closed():  # closed if the server shuts down while generating
            loop.call_soon_threadsafe(queue.put_nowait, (choice, piece))

    return deliver
