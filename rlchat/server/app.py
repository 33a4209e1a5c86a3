"""The HTTP application: the API in OpenAI's format, feedback, rewards, the page, health and metrics."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import re
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from importlib import metadata, resources
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from rlchat.chat.learning.supervisor import Supervisor
from rlchat.server.chat_api import add_chat_completions
from rlchat.server.completions_api import add_completions
from rlchat.server.engine import Engine
from rlchat.server.errors import APIError
from rlchat.server.feedback.api import LearningCollector, add_feedback, add_learning
from rlchat.server.feedback.caps import Caps
from rlchat.server.feedback.rewards import Rewards, add_reward
from rlchat.server.guard import Guard
from rlchat.server.metrics import Metrics
from rlchat.server.responses import Limits, Outbox, Service, unknown_model
from rlchat.server.responses_api import add_responses
from rlchat.server.schemas import (
    ErrorReply,
    Health,
    Model,
    ModelList,
    now,
)

log = logging.getLogger("rlchat")


# Sentences in place of pydantic's, by its type of error. A name of a file is all that must have a pattern.
_EXPECTED = {
    "string_too_long": "expected at most {max_length} characters",
    "string_too_short": "expected at least {min_length} characters",
    "string_pattern_mismatch": "expected the name of a file without its folder, of 1 to 256 characters",
    "too_long": "expected at most {max_length} of them, got {actual_length}",
    "too_short": "expected at least {min_length} of them, got {actual_length}",
}


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
    rewards: Rewards,
    supervisor: Supervisor | None = None,
    caps: Caps | None = None,
) -> Guard:
    """The application behind its :class:`Guard`.

    ``file`` is the name of the model file, as in feedback and saved conversations; the API's name of the model is
    ``file`` without its suffix. Feedback is appended to the file ``feedback``. ``hosts`` are the allowed host names in
    addition to localhost and addresses, ``origins`` the web origins in addition to the server's. ``supervisor``
    learns from the feedback, of which ``caps`` limit the number. The application closes it and ``engine`` at shutdown.
    """
    limits = limits or Limits()

    app = _application([engine.close] if supervisor is None else [supervisor.close, engine.close])
    _answer_errors(app)
    metrics = Metrics(engine)
    model = Model(
        id=Path(file).stem,
        created=now(),
        file=file,
        max_length=max_length,
        has_reward=rewards.available,
        learns=supervisor is not None,
    )
    service = Service(engine, model, limits, metrics, Outbox())
    for add in (add_chat_completions, add_completions, add_responses):
        add(app, service)
    _add_models(app, model, rewards)
    _add_monitoring(app, engine, metrics)
    add_feedback(app, feedback, engine, metrics, supervisor, caps or Caps())
    if supervisor is not None:
        add_learning(app, supervisor)
        metrics.add(LearningCollector(supervisor))
    add_reward(app, rewards)
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


def _application(at_shutdown: Sequence[Callable[[], None]]) -> FastAPI:
    """An application without endpoints, which calls the functions ``at_shutdown`` in this order."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        for close in at_shutdown:
            await asyncio.to_thread(close)

    return FastAPI(
        title="rlchat",
        version=metadata.version("rlchat"),
        description="Chat completions from a model trained with rlchat.",
        lifespan=lifespan,
        docs_url=None,  # these pages load scripts from other servers
        redoc_url=None,
        responses={"4XX": {"model": ErrorReply}, "5XX": {"model": ErrorReply}},
    )


def _add_models(app: FastAPI, model: Model, rewards: Rewards) -> None:
    def current() -> Model:  # versions may have a reward that the original has not
        return model.model_copy(update={"has_reward": rewards.available})

    @app.get("/v1/models")
    @app.get("/v1/models/", include_in_schema=False)
    async def models() -> ModelList:
        """The model of this server."""
        return ModelList(data=[current()])

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Model:
        """The model with this name."""
        if name.rstrip("/") != model.id:
            raise unknown_model(name, model)
        return current()


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


def _add_page(app: FastAPI) -> None:
    page, policy = _page()

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy, "Cache-Control": "no-cache"})


def _answer_errors(app: FastAPI) -> None:
    """Convert every error to the format of OpenAI's API."""

    @app.exception_handler(APIError)
    async def refused(_: Request, error: APIError) -> Response:
        return error.response

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        # If a union of types fails, the deepest error belongs to the intended type.
        alike = [one for one in error.errors() if one["loc"][:2] == first["loc"][:2]]
        first = max(alike, key=lambda one: len(one["loc"]))
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
        if first["type"] in _EXPECTED:
            message = _EXPECTED[first["type"]].format(**first["ctx"])
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
