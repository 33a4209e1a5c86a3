"""The replies to one request: from the engine's thread to the server's event loop."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from fastapi.concurrency import run_in_threadpool

from rlchat.models.sampling import Sampling
from rlchat.server.engine import Engine, EngineFullError, Piece, Ticket
from rlchat.server.errors import APIError
from rlchat.server.schemas import ChatRequest, Seen, Usage


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may ask for."""

    max_body: int = 1_000_000  # bytes
    max_messages: int = 1_000
    max_tokens: int = 1_024  # of a reply
    max_seconds: float = 120.0  # from the request to the last token; as long for its body to arrive


class Replies:
    """``n`` replies to a request, each in the engine's queue; iterate over their pieces, or :meth:`cancel` them."""

    def __init__(self, prompt: list[int], seen: Seen, tickets: list[Ticket], queue: asyncio.Queue[tuple[int, Piece]]):
        self.prompt = prompt
        self.seen = seen
        self._tickets = tickets
        self._queue = queue
        self._tokens = [0] * len(tickets)

    @classmethod
    async def ask(cls, engine: Engine, max_length: int, request: ChatRequest, limits: Limits) -> Replies:
        """Puts ``request`` in the queue. Raises :class:`APIError` where it asks for too much, or too many wait."""
        if len(request.messages) > limits.max_messages:
            raise APIError(400, f"more than {limits.max_messages:,} messages", param="messages")
        asked = min(request.max_completion_tokens or request.max_tokens or limits.max_tokens, limits.max_tokens)
        # As in a chat: the oldest messages give way to the reply, until half of the context is left to them.
        room = max(max_length - asked, max_length // 2)
        rendered = await run_in_threadpool(engine.tokenizer.render_prompt, request.conversation, room)
        usual = Sampling()
        try:
            sampling = Sampling(
                min(asked, max_length - len(rendered.ids)),
                usual.temperature if request.temperature is None else request.temperature,
                request.top_k or usual.top_k,
                request.top_p or usual.top_p,
            )
        except ValueError as error:
            raise APIError(400, str(error)) from error
        queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        seed = secrets.randbits(63) if request.seed is None else request.seed
        deadline = time.monotonic() + limits.max_seconds
        tickets = [
            Ticket(
                rendered.ids,
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
            raise APIError(429, f"{error}; try again", code="engine_full", headers={"Retry-After": "1"}) from error
        return cls(rendered.ids, Seen(dropped_messages=rendered.dropped, cut_tokens=rendered.cut), tickets, queue)

    def __len__(self) -> int:
        return len(self._tickets)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        """The pieces as they come, each with the number of its choice. Raises :class:`APIError` where none can."""
        left = len(self)
        while left:
            choice, piece = await self._queue.get()
            self._tokens[choice] = piece.tokens
            if piece.finish == "failed":
                raise APIError(500, "the model failed at this request; the server's log says why")
            if piece.finish == "expired":
                raise APIError(503, "the server did not come to this request in time; try again")
            left -= piece.finish is not None
            yield choice, piece

    @property
    def usage(self) -> Usage:
        """Counts of tokens so far."""
        prompt, said = len(self.prompt), sum(self._tokens)
        return Usage(prompt_tokens=prompt, completion_tokens=said, total_tokens=prompt + said)

    def cancel(self) -> None:
        """Says that nobody wants them any more: what is not generated yet never will be."""
        for ticket in self._tickets:
            ticket.cancelled = True


def _into(queue: asyncio.Queue[tuple[int, Piece]], choice: int) -> Callable[[Piece], None]:
    loop = asyncio.get_running_loop()

    def deliver(piece: Piece) -> None:
        if not loop.is_closed():  # as it is when the server goes down with replies under way
            loop.call_soon_threadsafe(queue.put_nowait, (choice, piece))

    return deliver
