"""A web service that scores responses, in this process, for tests of `HTTPReward`."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, bytes]


class Service:
    """An HTTP server in this process that replies with ``answer`` and records the requests."""

    def __init__(self, answer: Callable[[int, dict[str, Any]], Answer | None]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.tokens: list[str | None] = []
        self.release = threading.Event()
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                service.requests.append(body)
                service.tokens.append(self.headers.get("Authorization"))
                reply = answer(len(service.requests), body)
                if reply is None:  # too late for everybody
                    service.release.wait(30)
                    return
                self.send_response(reply[0])
                if reply[0] == 302:
                    self.send_header("Location", "/elsewhere")
                self.end_headers()
                self.wfile.write(reply[1])

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/score"
        self.thread = threading.Thread(target=self.server.serve_forever)

    def __enter__(self) -> Service:
        self.thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self.release.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def lengths(_: int, body: dict[str, Any]) -> Answer:
    return 200, json.dumps({"scores": [len(item["response"]) for item in body["items"]]}).encode()
