"""What uvicorn itself lacks: a time limit for request headers, and an end of running responses at shutdown."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

HEADER_SECONDS = 30.0
GRACE_SECONDS = 3.0  # time for running responses to finish at shutdown


class Server(uvicorn.Server):
    """Calls ``abort`` some time after the signal to stop, so that clients get an error instead of a broken stream."""

    def __init__(self, config: uvicorn.Config, abort: Callable[[], None]) -> None:
        super().__init__(config)
        self._abort = abort

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop on SIGINT or SIGTERM."""
        timer = threading.Timer(GRACE_SECONDS, self._abort)
        timer.daemon = True
        timer.start()
        super().handle_exit(sig, frame)


class HeaderTimeoutProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """Closes a connection whose request line and headers are not complete within ``header_seconds``."""

    header_seconds = HEADER_SECONDS

    def connection_made(self, transport: Any) -> None:
        """Start the timer of the first request."""
        self._header_timer: asyncio.TimerHandle | None = None
        super().connection_made(transport)
        self._set_header_timer()

    def data_received(self, data: bytes) -> None:
        """Start the timer with the first bytes of a request; stop it when the headers are complete."""
        super().data_received(data)
        self._set_header_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        if self._header_timer is not None:
            self._header_timer.cancel()
        super().connection_lost(exc)

    def _set_header_timer(self) -> None:
        if self._awaits_headers():
            if self._header_timer is None:
                self._header_timer = self.loop.call_later(self.header_seconds, self._close_if_late)
        elif self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _awaits_headers(self) -> bool:
        return self.cycle is None or bool(self.cycle.response_complete)

    def _close_if_late(self) -> None:
        self._header_timer = None
        if self._awaits_headers() and not self.transport.is_closing():
            self.transport.close()
