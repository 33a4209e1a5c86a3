"""The application: chat completions in OpenAI's protocol, feedback, the page, and what watches a server."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from importlib import metadata, resources
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, PlainTextResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from rlchat.chat.feedback import Correction, append_feedback
from rlchat.conversation import Conversation
from rlchat.errors import UserError
from rlchat.server.engine import Engine, Finish
from rlchat.server.errors import APIError
from rlchat.server.guard import Guard
from rlchat.server.metrics import Metrics
from rlchat.server.responses import Limits, Replies
from rlchat.server.schemas import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatRequest,
    Choice,
    ChunkChoice,
    Delta,
    ErrorReply,
    FeedbackKept,
    FeedbackRequest,
    Health,
    Model,
    ModelList,
    ReplyMessage,
    new_id,
)

log = logging.getLogger("rlchat")

# One event of a stream, for the API's description.
_EVENT = {
    "type": "object",
    "properties": {"data": {"type": "string", "description": "A chat.completion.chunk, an error, or [DONE]."}},
    "required": ["data"],
}

_CLIENT_GONE = 499  # nginx's number; nobody is left to read it, but /metrics counts it


def create_api(
    engine: Engine,
    file: str,
    max_length: int,
    *,
    feedback: Path,
    limits: Limits | None = None,
    hosts: Iterable[str] = (),
    api_key: str | None = None,
) -> Guard:
    """The application, behind its guard.

    ``file`` is the name of the model's bundle, which feedback and saved conversations have; clients call the model by
    it, without the suffix. ``feedback`` is the file that the page's verdicts are appended to; ``hosts`` the names that
    the server goes by beside localhost and addresses. It closes ``engine`` when it shuts down.
    """
    model = Path(file).stem
    limits = limits or Limits()
    described = Model(id=model, created=int(time.time()), file=file, max_length=max_length)

    def unknown(name: str) -> APIError:
        sentence = f"no model {name!r}; this server has {model!r}"
        return APIError(404, sentence, param="model", code="model_not_found")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(
        title="rlchat",
        version=metadata.version("rlchat"),
        description="Chat completions from a model that rlchat trained.",
        lifespan=lifespan,
        docs_url=None,  # its pages would load their scripts from elsewhere
        redoc_url=None,
        responses={"4XX": {"model": ErrorReply}, "5XX": {"model": ErrorReply}},
    )
    _answer_errors(app)

    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses={200: {"content": {"text/event-stream": {"schema": _EVENT}}}},
    )
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Replies to a conversation."""
        if body.model not in (None, model):
            raise unknown(body.model)
        asked = time.monotonic()
        replies = await Replies.ask(engine, max_length, body, limits)

        def first_piece() -> None:
            metrics.first_token_seconds.observe(time.monotonic() - asked)

        if body.stream:
            wants_usage = bool(body.stream_options and body.stream_options.include_usage)
            return _EventStream(replies, _events(replies, model, wants_usage, first_piece))
        return await _whole(replies, model, request, first_piece)

    @app.get("/v1/models")
    async def models() -> ModelList:
        """The model that this server has."""
        return ModelList(data=[described])

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Model:
        """The model of that name, which can only be this server's."""
        if name != model:
            raise unknown(name)
        return described

    @app.get("/health")
    async def health() -> Health:
        """Whether replies can be had."""
        if not engine.alive:
            raise APIError(503, "the engine has stopped")
        return Health()

    @app.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        """Counts and times, for Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.post("/feedback")
    def keep_feedback(body: FeedbackRequest) -> FeedbackKept:
        """Keeps what somebody thinks of a reply, as training data."""
        verdict = body.verdict or Correction(body.correction or "")
        prompt = Conversation(tuple(message.to_message() for message in body.messages))
        try:
            append_feedback(feedback, prompt, body.reply, verdict, model=file)
        except UserError as error:
            if isinstance(error.__cause__, OSError):  # not the client's fault, and where the file is not its business
                log.error("%s", error)
                raise APIError(507, "the server cannot write feedback; its log says why") from error
            raise APIError(400, str(error)) from error
        metrics.feedback.labels(body.verdict or "corrected").inc()
        return FeedbackKept()

    page, policy = _page()

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy, "Cache-Control": "no-cache"})

    metrics = Metrics(engine, tuple(route.path for route in app.routes if hasattr(route, "path")))
    return Guard(
        app,
        hosts=hosts,
        api_key=api_key,
        max_body=limits.max_body,
        body_seconds=limits.max_seconds,
        observe=metrics.observe,
    )


async def _whole(replies: Replies, model: str, request: Request, first_piece: Callable[[], None]) -> Response:
    """All replies at once; a client that goes away meanwhile cancels them."""

    async def collect() -> list[Choice]:
        texts, finishes = [""] * len(replies), dict[int, Finish]()
        async for choice, piece in replies:
            texts[choice] += piece.text
            if piece.finish is not None:
                finishes[choice] = piece.finish
        return [
            Choice(index=choice, message=ReplyMessage(content=text), finish_reason=_reason(finishes[choice]))
            for choice, text in enumerate(texts)
        ]

    collecting, leaving = asyncio.ensure_future(collect()), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            return Response(status_code=_CLIENT_GONE)
        choices = collecting.result()
    finally:
        replies.cancel()
        collecting.cancel()
        leaving.cancel()
    first_piece()
    completion = ChatCompletion(model=model, choices=choices, usage=replies.usage, rlchat=replies.seen)
    return Response(completion.model_dump_json(), media_type="application/json")


async def _gone(request: Request) -> None:
    """Returns when the client has closed the connection; its body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(
    replies: Replies, model: str, wants_usage: bool, first_piece: Callable[[], None]
) -> AsyncIterator[str]:
    """The replies as server-sent events: chunks of JSON, then ``[DONE]``."""
    stamp: dict[str, Any] = {
        "id": new_id(),
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": model,
    }

    def event(*choices: ChunkChoice, **more: Any) -> str:
        chunk = ChatCompletionChunk(**stamp, choices=list(choices), **more)
        return f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n"

    for choice in range(len(replies)):
        opening = Delta(role="assistant", content="")
        yield event(ChunkChoice(index=choice, delta=opening, finish_reason=None), rlchat=replies.seen)
    begun = False
    try:
        async for choice, piece in replies:
            if not begun:
                begun = True
                first_piece()
            if piece.text:
                yield event(ChunkChoice(index=choice, delta=Delta(content=piece.text), finish_reason=None))
            if piece.finish is not None:
                yield event(ChunkChoice(index=choice, delta=Delta(), finish_reason=_reason(piece.finish)))
    except APIError as error:  # too late for a status
        yield f"data: {json.dumps(error.body)}\n\n"
        return
    if wants_usage:
        yield event(usage=replies.usage)
    yield "data: [DONE]\n\n"


def _reason(finish: Finish) -> Literal["stop", "length"]:
    assert finish in ("stop", "length"), finish
    return finish


class _EventStream(StreamingResponse):
    """Server-sent events of ``replies``, which end with the answer: sent, broken off by the client, or never begun."""

    def __init__(self, replies: Replies, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._replies = replies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._replies.cancel()


def _answer_errors(app: FastAPI) -> None:
    """Every error becomes one of the API's."""

    @app.exception_handler(APIError)
    async def refused(_: Request, error: APIError) -> Response:
        return error.response

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return APIError(400, "the body is not JSON").response
        if first["loc"] == ("body",) and first["type"] == "missing":
            return APIError(400, "the body is empty; send a JSON object").response
        if first["loc"] == ("body",) and first["type"] == "model_attributes_type":
            if isinstance(error.body, bytes):  # as FastAPI leaves what is not said to be JSON
                return APIError(400, "send the header Content-Type: application/json").response
            return APIError(400, "the body is JSON, but no object").response
        # Names of fields and numbers of items; pydantic also tells which type of a union it tried.
        where = ".".join(part for part in map(str, first["loc"][1:]) if re.fullmatch(r"\w+", part))
        message = str(first["msg"]).removeprefix("Value error, ")
        return APIError(400, f"{where}: {message}" if where else message, param=where or None).response

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        return APIError(error.status_code, str(error.detail), headers=dict(error.headers or {})).response

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> Response:
        return APIError(500, "the server failed at this request; its log says why").response


def _page() -> tuple[str, str]:
    """The page, and the policy under which it may run the script and the style that it holds, and nothing else."""
    page = resources.files("rlchat.server").joinpath("page.html").read_text(encoding="utf-8")

    def hashes(tag: str) -> str:
        digests = (hashlib.sha256(inner.encode()).digest() for inner in re.findall(f"<{tag}>(.*?)</{tag}>", page, re.S))
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    return page, (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        f"img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
