"""`Guard`: ASGI middleware that checks requests before the application sees them.

Any web page in the user's browser can reach a server on the user's machine. Therefore the Host header must be an
address or an allowed name (against DNS rebinding); an Origin header must be the server's own or an allowed one; and the
API key must match if there is one. Bodies are read here, up to a size and within a time.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.responses import Response

from rlchat.server.errors import APIError
from rlchat.utils.hosts import is_address_or

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

# Paths that need no key: the page, which asks the user for the key, and health checks.
_OPEN_PATHS = ("/", "/health")

_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


class Guard:
    """The middleware. Rejected requests get an API error.

    ``origins`` are the web origins, such as ``http://localhost:3000``, whose pages may use the API; ``*`` allows all.
    ``observe`` is called with the path, the status and the seconds until the response was complete.
    """

    def __init__(
        self,
        application: Application,
        *,
        hosts: Iterable[str],
        origins: Iterable[str] = (),
        api_key: str | None,
        max_body: int,
        body_seconds: float,
        observe: Callable[[str, int, float], None],
    ) -> None:
        self.application = application
        self.hosts = {"localhost", *(host.lower() for host in hosts)}
        self.origins = {origin.lower().rstrip("/") for origin in origins}
        self.api_key = api_key
        self.max_body = max_body
        self.body_seconds = body_seconds
        self.observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.application(scope, receive, send)
            return
        started, status = time.monotonic(), 0
        headers = self._response_headers(scope)

        async def answer(event: Event) -> None:
            nonlocal status
            if event["type"] == "http.response.start":
                status = event["status"]
                event["headers"] = [*event.get("headers", ()), *headers]
            await send(event)

        try:
            try:
                if self._is_preflight(scope):
                    await _preflight_response(scope, receive, answer)
                    return
                self.check(scope)
                body = await asyncio.wait_for(self.read(scope, receive), self.body_seconds)
            except asyncio.TimeoutError:
                seconds = f"{self.body_seconds:g} seconds"
                await APIError(408, f"the request was not complete within {seconds}").answer(scope, receive, answer)
            except APIError as error:
                await error.answer(scope, receive, answer)
            else:
                if body is not None:
                    # The server sends no body in response to HEAD, so the application can treat it as GET.
                    method = "GET" if scope["method"] == "HEAD" else scope["method"]
                    await self.application({**scope, "method": method}, _replay(body, receive), answer)
        finally:
            self.observe(scope["path"], status, time.monotonic() - started)

    def _response_headers(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        """Security headers, and those of CORS for a page of an allowed origin."""
        origin = dict(scope["headers"]).get(b"origin")
        if origin is None or not self.allows_origin(origin.decode("latin-1")):
            return [*_HEADERS, *([(b"vary", b"Origin")] if self.origins else [])]
        plain = [header for header in _HEADERS if header[0] != b"cross-origin-resource-policy"]
        exposed = (b"access-control-expose-headers", b"Retry-After, X-Rlchat-Version")
        cors = [(b"access-control-allow-origin", origin), exposed]
        return [*plain, *cors, (b"cross-origin-resource-policy", b"cross-origin"), (b"vary", b"Origin")]

    def _is_preflight(self, scope: Scope) -> bool:
        """Whether this is a CORS preflight request for a page of an allowed origin; it contains no key."""
        headers = dict(scope["headers"])
        asks = scope["method"] == "OPTIONS" and b"access-control-request-method" in headers
        known = self.knows(headers.get(b"host", b"").decode("latin-1"))
        return asks and known and self.allows_origin(headers.get(b"origin", b"").decode("latin-1"))

    def allows_origin(self, origin: str) -> bool:
        """Whether pages of ``origin`` may use the API although it is not the server's own."""
        return bool(origin) and ("*" in self.origins or origin.lower() in self.origins)

    def check(self, scope: Scope) -> None:
        """Raise :class:`APIError` for a request that is not allowed."""
        headers: dict[bytes, bytes] = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if not self.knows(host):
            raise APIError(403, f"unknown host {host!r}: start the server with --allow-host to allow this name")
        origin = headers.get(b"origin")
        text = "" if origin is None else origin.decode("latin-1")
        is_own = origin is None or urlsplit(text).netloc.lower() == host.lower()
        if not is_own and not self.allows_origin(text):
            raise APIError(403, f"origin {text!r} is not allowed: start the server with --allow-origin {text}")
        if self.api_key is not None and scope["path"] not in _OPEN_PATHS:
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            # Compared in constant time, so that timing reveals nothing about the key.
            if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self.api_key.encode()):
                raise APIError(401, "the API key is missing or wrong", code="invalid_api_key")

    def knows(self, host: str) -> bool:
        """Whether ``host`` is an address or an allowed name, with or without a port."""
        return is_address_or(host, self.hosts)

    async def read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body; None if the client disconnected before its end. Raises :class:`APIError` if it is too large."""
        too_large = APIError(413, f"the request body is too large: expected at most {self.max_body:,} bytes")
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_body:
            raise too_large
        body = bytearray()
        while True:
            event = await receive()
            if event["type"] == "http.disconnect":
                return None
            body += event.get("body", b"")
            if len(body) > self.max_body:
                raise too_large
            if not event.get("more_body", False):
                return bytes(body)


async def _preflight_response(scope: Scope, receive: Receive, send: Send) -> None:
    headers = {
        "Access-Control-Allow-Methods": "GET, HEAD, POST",
        "Access-Control-Allow-Headers": dict(scope["headers"])
        .get(b"access-control-request-headers", b"authorization, content-type")
        .decode("latin-1"),
        "Access-Control-Max-Age": "600",
    }
    await Response(status_code=204, headers=headers)(scope, receive, send)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that returns ``body`` first, although it was already read."""
    events: list[Event] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Event:
        return events.pop() if events else await receive()

    return again
