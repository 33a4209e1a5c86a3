"""The HTTP application: chat completions in OpenAI's format, feedback, the page, health and metrics."""

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

# One event of a stream, for the OpenAPI schema.
_EVENT = {
    "type": "object",
    "properties": {"data": {"type": "string", "description": "A chat.completion.chunk, an error, or [DONE]."}},
    "required": ["data"],
}

_CLIENT_GONE = 499  # nginx's status for a client that disconnected; only /metrics shows it


def create_api(
    engine: Engine,
    file: str,
    max_length: int,
    *,
    feedback: Path,
    limits: Limits | None = None,
    hosts: Iterable[str] = (),
    origins: Iterable[str] = (),
    api_key: str | None = None,
) -> Guard:
    """The application behind its :class:`Guard`.

    ``file`` is the name of the model file, as in feedback and saved conversations; the API's name of the model is
    ``file`` without its suffix. ``feedback`` is the file to which feedback is appended. ``hosts`` are the allowed host
    names beside localhost and addresses, ``origins`` the allowed web origins beside the server's own. The application
    closes ``engine`` at shutdown.
    """
    limits = limits or Limits()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(
        title="rlchat",
        version=metadata.version("rlchat"),
        description="Chat completions from a model trained with rlchat.",
        lifespan=lifespan,
        docs_url=None,  # these pages load scripts from other servers
        redoc_url=None,
        responses={"4XX": {"model": ErrorReply}, "5XX": {"model": ErrorReply}},
    )
    _answer_errors(app)
    metrics = Metrics(engine)
    model = Model(id=Path(file).stem, created=int(time.time()), file=file, max_length=max_length)
    _add_chat(app, engine, model, limits, metrics)
    _add_models(app, model)
    _add_monitoring(app, engine, metrics)
    _add_feedback(app, feedback, file, metrics)
    _add_page(app)
    metrics.paths = frozenset(route.path for route in app.routes if hasattr(route, "path"))
    return Guard(
        app,
        hosts=hosts,
        origins=origins,
        api_key=api_key,
        max_body=limits.max_body,
        body_seconds=limits.max_seconds,
        observe=metrics.observe,
    )


def _unknown_model(name: str, model: Model) -> APIError:
    return APIError(404, f"unknown model {name!r}: this server has {model.id!r}", param="model", code="model_not_found")


def _add_chat(app: FastAPI, engine: Engine, model: Model, limits: Limits, metrics: Metrics) -> None:
    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses={200: {"content": {"text/event-stream": {"schema": _EVENT}}}},
    )
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Respond to a conversation."""
        if body.model not in (None, model.id):
            raise _unknown_model(body.model, model)
        if (option := body.unsupported_option) is not None:
            raise APIError(400, f"{option} is not supported by this server: remove it", param=option)
        asked = time.monotonic()
        replies = await Replies.ask(engine, model.max_length, body, limits)

        def first_piece() -> None:
            metrics.first_token_seconds.observe(time.monotonic() - asked)

        if body.stream:
            wants_usage = bool(body.stream_options and body.stream_options.include_usage)
            return _EventStream(replies, _events(replies, model.id, wants_usage, first_piece))
        return await _whole(replies, model.id, request, first_piece)


def _add_models(app: FastAPI, model: Model) -> None:
    @app.get("/v1/models")
    @app.get("/v1/models/", include_in_schema=False)
    async def models() -> ModelList:
        """The model of this server."""
        return ModelList(data=[model])

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Model:
        """The model with this name."""
        if name.rstrip("/") != model.id:
            raise _unknown_model(name, model)
        return model


def _add_monitoring(app: FastAPI, engine: Engine, metrics: Metrics) -> None:
    @app.get("/health")
    async def health() -> Health:
        """Whether the server can generate responses."""
        if not engine.alive:
            raise APIError(503, "the engine has stopped")
        return Health()

    @app.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        """Metrics in Prometheus's format."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _add_feedback(app: FastAPI, path: Path, file: str, metrics: Metrics) -> None:
    @app.post("/feedback")
    def add_feedback(body: FeedbackRequest) -> FeedbackKept:
        """Save feedback on a response as training data. The last verdict on a response replaces earlier ones."""
        verdict = body.verdict or Correction(body.correction or "")
        prompt = Conversation(tuple(message.to_message() for message in body.messages))
        try:
            append_feedback(path, prompt, body.reply, verdict, model=file)
        except UserError as error:
            if isinstance(error.__cause__, OSError):  # not the client's fault, and the path is not its business
                log.error("%s", error)
                raise APIError(507, "the server cannot write feedback: see its log") from error
            raise APIError(400, str(error)) from error
        metrics.feedback.labels(body.verdict or "corrected").inc()
        return FeedbackKept()


def _add_page(app: FastAPI) -> None:
    page, policy = _page()

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy, "Cache-Control": "no-cache"})


async def _whole(replies: Replies, model: str, request: Request, first_piece: Callable[[], None]) -> Response:
    """All responses in one body. They are cancelled if the client disconnects."""

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
    """Return when the client has closed the connection; the request body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(
    replies: Replies, model: str, wants_usage: bool, first_piece: Callable[[], None]
) -> AsyncIterator[str]:
    """The responses as server-sent events: JSON chunks, then ``[DONE]``."""
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
    started = False
    try:
        async for choice, piece in replies:
            if not started:
                started = True
                first_piece()
            if piece.text:
                yield event(ChunkChoice(index=choice, delta=Delta(content=piece.text), finish_reason=None))
            if piece.finish is not None:
                yield event(ChunkChoice(index=choice, delta=Delta(), finish_reason=_reason(piece.finish)))
    except APIError as error:  # the status was already sent
        yield f"data: {json.dumps(error.body)}\n\n"
        return
    if wants_usage:
        yield event(usage=replies.usage)
    yield "data: [DONE]\n\n"


def _reason(finish: Finish) -> Literal["stop", "length"]:
    assert finish in ("stop", "length"), finish
    return finish


class _EventStream(StreamingResponse):
    """Server-sent events of ``replies``, which are cancelled if the client disconnects."""

    def __init__(self, replies: Replies, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._replies = replies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._replies.cancel()


def _answer_errors(app: FastAPI) -> None:
    """Convert every error to the format of OpenAI's API."""

    @app.exception_handler(APIError)
    async def refused(_: Request, error: APIError) -> Response:
        return error.response

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return APIError(400, "the body is not valid JSON").response
        if first["loc"] == ("body",) and first["type"] == "missing":
            return APIError(400, "the body is empty: expected a JSON object").response
        if first["loc"] == ("body",) and first["type"] == "model_attributes_type":
            if isinstance(error.body, bytes):  # FastAPI leaves a body of another content type unparsed
                return APIError(
                    400, "unsupported content type: send the header Content-Type: application/json"
                ).response
            return APIError(400, "the body is JSON, but not an object").response
        # Names of fields and indices of items, without the types of a union, which pydantic also lists.
        where = ".".join(part for part in map(str, first["loc"][1:]) if re.fullmatch(r"\w+", part))
        message = str(first["msg"]).removeprefix("Value error, ")
        return APIError(400, f"{where}: {message}" if where else message, param=where or None).response

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        return APIError(error.status_code, str(error.detail), headers=dict(error.headers or {})).response

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> Response:
        return APIError(500, "internal error: see the server's log").response


def _page() -> tuple[str, str]:
    """The page, and a Content-Security-Policy that allows only the scripts and styles in it."""
    page = resources.files("rlchat.server").joinpath("page.html").read_text(encoding="utf-8")

    def hashes(tag: str) -> str:
        digests = (hashlib.sha256(inner.encode()).digest() for inner in re.findall(f"<{tag}>(.*?)</{tag}>", page, re.S))
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    return page, (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        f"img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
