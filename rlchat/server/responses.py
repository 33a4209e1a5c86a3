"""The responses to one request, passed from the engine's thread to the server's event loop."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

from fastapi import Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from rlchat.chat.context import fit_continuation, fit_prompt
from rlchat.conversation import Conversation
from rlchat.models.sampling import Sampling
from rlchat.server.engine import Engine, EngineFullError, Loaded, Piece, Ticket
from rlchat.server.errors import APIError
from rlchat.server.metrics import Metrics
from rlchat.server.schemas import ChatRequest, GenerationRequest, Model, Seen, Usage

VERSION_HEADER = "X-Rlchat-Version"
CLIENT_GONE = 499  # nginx's status for a client that disconnected; only /metrics shows it

# Characters of a conversation that is tokenized in the event loop, which takes less than 1 ms. A longer one is passed
# to another thread: that takes longer while the engine is running, but does not hold up other requests.
_SHORT = 2_000

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on one request."""

    max_body: int = 1_000_000  # bytes
    max_messages: int = 1_000
    max_tokens: int = 1_024  # per response
    max_seconds: float = 120.0  # from the request to the last token, and for the body to arrive


@dataclass(frozen=True, slots=True)
class Service:
    """What all endpoints that generate text share."""

    engine: Engine
    model: Model
    limits: Limits
    metrics: Metrics
    outbox: Outbox

    def check(self, request: GenerationRequest) -> None:
        """Raise :class:`APIError` for another model and for options that would have to be ignored."""
        if request.model not in (None, self.model.id):
            raise unknown_model(request.model, self.model)
        if (option := request.unsupported_option) is not None:
            hint = request.hints.get(option, "remove it")
            raise APIError(400, f"{option} is not supported by this server: {hint}", param=option)

    def timer(self) -> Callable[[], None]:
        """A function to call with the first piece of a response; only the first call counts."""
        asked = time.monotonic()
        pending = [self.metrics.first_token_seconds]

        def first_piece() -> None:
            if pending:
                pending.pop().observe(time.monotonic() - asked)

        return first_piece


def unknown_model(name: str | None, model: Model) -> APIError:
    """The error response to a request for a model that this server does not have."""
    return APIError(404, f"unknown model {name!r}: this server has {model.id!r}", param="model", code="model_not_found")


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids that fit into the context, and how many tokens the response may have."""

    ids: list[int]
    max_new_tokens: int


class Outbox:
    """Passes pieces from the engine's thread to the event loop, all those of a step at once.

    Whenever the loop wakes up, it takes the interpreter lock, and the engine waits for it: up to 5 ms, as often as it
    wakes the loop.
    """

    def __init__(self) -> None:
        self._pieces: deque[tuple[asyncio.Queue[tuple[int, Piece]], int, Piece]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None

    def receiver(self, queue: asyncio.Queue[tuple[int, Piece]], choice: int) -> Callable[[Piece], None]:
        """A function for the engine's thread: its pieces reach ``queue`` after :meth:`wake`. Call it in the loop."""
        self._loop = asyncio.get_running_loop()
        return lambda piece: self._pieces.append((queue, choice, piece))

    def wake(self) -> None:
        """Let the event loop take the pieces. Called in the engine's thread."""
        if self._loop is not None and not self._loop.is_closed():  # closed if the server stops while generating
            self._loop.call_soon_threadsafe(self._hand_out)

    def _hand_out(self) -> None:
        while self._pieces:
            queue, choice, piece = self._pieces.popleft()
            queue.put_nowait((choice, piece))


class Replies:
    """``n`` responses to each prompt of a request, in the engine's queue.

    Iterate over their pieces, or :meth:`cancel` them. The responses to one prompt have consecutive indices.
    ``version`` is the name of the model file that generates them.
    """

    def __init__(
        self, prompts: Sequence[Prompt], tickets: list[Ticket], queue: asyncio.Queue[tuple[int, Piece]], version: str
    ):
        self.prompts = prompts
        self.version = version
        self._tickets = tickets
        self._queue = queue
        self._tokens = [0] * len(tickets)

    @classmethod
    def start(
        cls,
        service: Service,
        prompts: Sequence[Prompt],
        request: GenerationRequest,
        *,
        logprobs: int | None = None,
        loaded: Loaded | None = None,
    ) -> Replies:
        """Queue responses to ``prompts``, by default of the active model.

        Raises :class:`APIError` for invalid options or if the queue is full.
        """
        loaded = loaded or service.engine.loaded
        queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        seed = secrets.randbits(63) if request.seed is None else request.seed
        deadline = time.monotonic() + service.limits.max_seconds
        choices = request.n or 1
        tickets = [
            Ticket(
                prompt.ids,
                _sampling(request, min(prompt.max_new_tokens, service.limits.max_tokens)),
                service.outbox.receiver(queue, number * choices + choice),
                deadline,
                seed=seed,
                choice=choice,
                stop=request.stop_strings,
                logprobs=logprobs,
                streams=bool(request.stream),
                wake=service.outbox.wake,
                loaded=loaded,
            )
            for number, prompt in enumerate(prompts)
            for choice in range(choices)
        ]
        try:
            service.engine.submit(tickets)
        except EngineFullError as error:
            raise engine_full(error) from error
        return cls(prompts, tickets, queue, loaded.version)

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

    async def collect(self) -> list[Piece]:
        """The whole response of each choice, in one piece."""
        whole = [Piece("", 0)] * len(self)
        async for choice, piece in self:
            before = whole[choice]
            whole[choice] = piece._replace(text=before.text + piece.text, logprobs=before.logprobs + piece.logprobs)
        return whole

    @property
    def usage(self) -> Usage:
        """Token counts so far."""
        prompt, generated = sum(len(one.ids) for one in self.prompts), sum(self._tokens)
        return Usage(prompt_tokens=prompt, completion_tokens=generated, total_tokens=prompt + generated)

    def cancel(self) -> None:
        """Stop generating them."""
        for ticket in self._tickets:
            ticket.cancelled = True


async def _run_here(work: Callable[..., Result], *args: Any) -> Result:
    return work(*args)


async def fit_chat(service: Service, request: ChatRequest) -> tuple[Prompt, Seen]:
    """The prompt of a conversation, and what did not fit. Raises :class:`APIError` if it exceeds a limit."""
    limits, tokenizer, max_length = service.limits, service.engine.tokenizer, service.model.max_length
    if len(request.messages) > limits.max_messages:
        raise APIError(
            400,
            f"messages: expected at most {limits.max_messages:,}, got {len(request.messages):,}",
            param="messages",
        )
    asked = None if request.tokens_asked is None else min(request.tokens_asked, limits.max_tokens)
    characters = sum(len(message.text) for message in request.conversation.messages)
    run = _run_here if characters <= _SHORT else run_in_threadpool
    if request.continue_final_message:
        *messages, begun = request.conversation.messages
        prompt = Conversation(tuple(messages))
        fitted = await run(fit_continuation, tokenizer, prompt, begun.text, max_length, asked)
        if fitted is None:
            raise APIError(
                400,
                f"messages: the response to continue fills the model's context of {max_length} tokens",
                param="messages",
            )
    else:
        fitted = await run(fit_prompt, tokenizer, request.conversation, max_length, asked)
    seen = Seen(
        dropped_messages=fitted.dropped_messages,
        cut_tokens=fitted.cut_tokens,
        dropped_system=fitted.dropped_system,
    )
    return Prompt(fitted.ids, fitted.max_new_tokens), seen


def engine_full(error: EngineFullError) -> APIError:
    """The error response for a full queue."""
    return APIError(429, f"{error}: try again later", code="engine_full", headers={"Retry-After": "1"})


async def unless_gone(request: Request, replies: Replies, answer: Awaitable[Result]) -> Result | Response:
    """The result of ``answer``; if the client disconnects before, ``replies`` are cancelled."""
    answering, leaving = asyncio.ensure_future(answer), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return answering.result() if answering.done() else Response(status_code=CLIENT_GONE)
    finally:
        replies.cancel()
        answering.cancel()
        leaving.cancel()


async def _gone(request: Request) -> None:
    """Return when the client has closed the connection; the request body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def version_header(version: str) -> dict[str, str]:
    """The header that names the model file of a response. Characters that a header cannot contain are quoted."""
    return {VERSION_HEADER: quote(version)}


def json_response(body: BaseModel, version: str) -> Response:
    """``body`` as the response of the model file ``version``."""
    return Response(body.model_dump_json(), media_type="application/json", headers=version_header(version))


class EventStream(StreamingResponse):
    """Server-sent events of ``replies``, which are cancelled if the client disconnects."""

    def __init__(self, replies: Replies, events: AsyncIterator[str]) -> None:
        headers = {"Cache-Control": "no-cache", **version_header(replies.version)}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._replies = replies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._replies.cancel()


def _sampling(request: GenerationRequest, max_new_tokens: int) -> Sampling:
    usual = Sampling()
    try:
        return Sampling(
            max_new_tokens,
            usual.temperature if request.temperature is None else request.temperature,
            max(request.top_k or 0, 0),  # -1 means 0
            request.top_p or usual.top_p,
        )
    except ValueError as error:
        raise APIError(400, str(error)) from error
