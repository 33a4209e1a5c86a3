"""Serves the page on this machine, with the rows that a run has written since the page last asked."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from rlchat.errors import UserError
from rlchat.look.page import build_page
from rlchat.look.rollouts import NAME, Rollouts
from rlchat.runs.curves import read_curves, stamp
from rlchat.utils.hosts import is_address_or

ADDRESS = "127.0.0.1"

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Run:
    """One run: its responses and its curves."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rollouts = Rollouts(folder / NAME)

    def chunk(self, first: int = 0, source: str = "", known_curves: str = "") -> str:
        """The rows from ``first`` on, and the curves unless the page has them."""
        now = stamp(self.folder)
        curves = None if now == known_curves else read_curves(self.folder)
        return self.rollouts.chunk(first, source, curves=curves, stamp=now)


class LookServer(ThreadingHTTPServer):
    """Serves the page over ``runs`` at 127.0.0.1. Raises :class:`UserError` if ``port`` cannot be used."""

    daemon_threads = True

    def __init__(self, runs: Sequence[Run], names: Sequence[str], port: int) -> None:
        self.runs = runs
        self.page = build_page(names)
        try:
            super().__init__((ADDRESS, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"cannot listen on {ADDRESS}:{port}: {reason}; choose another --port") from error

    @property
    def url(self) -> str:
        """The address of the page."""
        return f"http://{ADDRESS}:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    """``/`` is the page, and ``/runs/N`` the chunk of run N from the row ``first`` on."""

    server: LookServer

    def do_GET(self) -> None:
        # Another web page may reach this server under a name that it makes point to this machine (DNS rebinding).
        if not is_address_or(self.headers.get("Host", ""), {"localhost"}):
            self._answer(HTTPStatus.FORBIDDEN, "unknown host: use the address that rlchat look printed")
            return
        address = urlsplit(self.path)
        if address.path == "/":
            self._answer(HTTPStatus.OK, self.server.page, "text/html")
            return
        known = {f"/runs/{number}": run for number, run in enumerate(self.server.runs)}
        asked = {name: values[-1] for name, values in parse_qs(address.query).items()}
        first = asked.get("first", "0")
        if address.path not in known or not (first.isascii() and first.isdigit()):
            self._answer(HTTPStatus.NOT_FOUND, "not found")
            return
        try:
            chunk = known[address.path].chunk(int(first), asked.get("source", ""), asked.get("curves", ""))
        except OSError as error:  # the folder was deleted or moved
            self._answer(HTTPStatus.NOT_FOUND, f"{error.filename}: {error.strerror}")
        else:
            self._answer(HTTPStatus.OK, chunk)

    def _answer(self, status: HTTPStatus, text: str, kind: str = "text/plain") -> None:
        body = text.encode()
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        with contextlib.suppress(ConnectionError):  # the page was closed
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Prints nothing: the page asks every two seconds."""
