"""The time limit for request headers."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from helpers.chat_models import random_policy
from helpers.servers import HTTP, serving

from rlchat.server.protocol import HeaderTimeoutProtocol
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize("first", [b"", GET, GET + b"\r\n"], ids=["nothing", "half a request", "a whole one before"])
def test_incomplete_headers_time_out(
    tokenizer: ChatTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bytes
) -> None:
    monkeypatch.setattr(HeaderTimeoutProtocol, "header_seconds", 0.2)
    with serving(random_policy(tokenizer), tmp_path / "f") as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(first)
            if first.endswith(b"\r\n\r\n"):
                assert b" 200 " in connection.recv(10_000)
                connection.sendall(GET)
            rest = b""
            while received := connection.recv(10_000):  # returns nothing when the server has closed the connection
                rest += received
            assert rest in (b"", b'{"status":"ok"}')
        assert HTTP.get(f"{server.url}/health").status_code == 200
