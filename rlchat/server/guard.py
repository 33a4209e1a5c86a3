"""`Guard`: what stands between the network and the application.

A server on one's own machine can be reached by every web page that one's browser opens. So a request must name the
server by an address, or by a name that was allowed (against DNS rebinding); where a browser says which page it comes
from, that must be the server's own; and a key is asked for where there is one. Bodies are read here, whole, up to a
size and within a time.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from rlchat.server.errors import APIError

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

# What needs no key: the page, which asks for it, and what watches whether the server lives.
_OPEN_PATHS = ("/", "/health")

_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


class Guard:
    """ASGI middleware; what it refuses gets an error of the API, and ``observe`` sees every answer.

    ``observe`` is called with the path, the status and the seconds until the answer was complete.
    """

    def __init__(
        self,
        application: Application,
        *,
        hosts: Iterable[str],
        api_key: str | None,
        max_body: int,
        body_seconds: float,
        observe: Callable[[str, int, float], None],
    ) -> None:
        self.application = application
        self.hosts = {"localhost", *(host.lower() for host in hosts)}
        self.api_key = api_key
        self.max_body = max_body
        self.body_seconds = body_seconds
        self.observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.application(scope, receive, send)
            return
        began, status = time.monotonic(), 0

        async def answer(event: Event) -> None:
            nonlocal status
            if event["type"] == "http.response.start":
                status = event["status"]
                event["headers"] = [*event.get("headers", ()), *_HEADERS]
            await send(event)

        try:
            try:
                self.check(scope)
                body = await asyncio.wait_for(self.read(scope, receive), self.body_seconds)
            except asyncio.TimeoutError:
                seconds = f"{self.body_seconds:g} seconds"
                await APIError(408, f"the request was not complete within {seconds}").answer(scope, receive, answer)
            except APIError as error:
                await error.answer(scope, receive, answer)
            else:
                if body is not None:
                    await self.application(scope, _replay(body, receive), answer)
        finally:
            self.observe(scope["path"], status, time.monotonic() - began)

    def check(self, scope: Scope) -> None:
        """Raises :class:`APIError` for a request that may not come in."""
        headers: dict[bytes, bytes] = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if not self.knows(host):
            raise APIError(
                403, f"this server is not known as {host or 'nothing'!r}; start it with --allow-host to allow a name"
            )
        origin = headers.get(b"origin")
        if origin is not None and urlsplit(origin.decode("latin-1")).netloc.lower() != host.lower():
            raise APIError(403, "a page of another origin may not use this server")
        if self.api_key is not None and scope["path"] not in _OPEN_PATHS:
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            # In constant time, so that nobody can learn the key by how long a wrong one takes.
            if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self.api_key.encode()):
                raise APIError(401, "the API key is missing or wrong", code="invalid_api_key")

    def knows(self, host: str) -> bool:
        """Whether ``host`` is an address, or a name that this server goes by; either may have a port."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
            if name in self.hosts:
                return True
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    async def read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body; None where the client went away before it was complete. Raises :class:`APIError` if too large."""
        too_large = APIError(413, f"the request is larger than {self.max_body:,} bytes")
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


def _replay(body: bytes, receive: Receive) -> Receive:
    """``receive`` as it would have been had nobody read the body."""
    events: list[Event] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Event:
        return events.pop() if events else await receive()

    return again
