"""The guard: host names, origins, the API key, security headers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.chat_models import random_policy
from helpers.servers import HTTP, Server, serving

from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

KEY = "s3cret-key"


@pytest.fixture(scope="module")
def server(tokenizer: ChatTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    feedback = tmp_path_factory.mktemp("kept") / "feedback.jsonl"
    with serving(random_policy(tokenizer), feedback, hosts=["Chat.Example"], api_key=KEY) as server:
        yield server


def status(server: Server, path: str = "/health", **headers: str) -> int:
    return HTTP.get(f"{server.url}{path}", headers=headers).status_code


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", 200),
        ("localhost:8000", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("192.168.1.7", 200),  # an address cannot be rebound to another
        ("chat.example", 200),
        ("CHAT.example:443", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("127.0.0.1:8000@evil.example", 403),
        ("[", 403),
        ("", 403),
    ],
)
def test_allowed_host_names(server: Server, host: str, expected: int) -> None:
    """After DNS rebinding, the Host header still has the name of the other page."""
    assert status(server, Host=host) == expected


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ("http://localhost:8000", 200),
        ("http://localhost:8001", 403),
        ("http://evil.example", 403),
        ("null", 403),
        ("http://localhost:8000.evil.example", 403),
    ],
)
def test_allowed_origins(server: Server, origin: str, expected: int) -> None:
    assert status(server, Host="localhost:8000", Origin=origin) == expected


def test_a_preflight_of_another_origin_is_rejected(server: Server) -> None:
    headers = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    answer = HTTP.options(f"{server.url}/v1/chat/completions", headers=headers)
    assert answer.status_code == 403
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_form_on_another_site_cannot_post(server: Server) -> None:
    """A form can send text without a preflight; it is not parsed as JSON."""
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "text/plain"}
    body = '{"messages": [{"role": "user", "content": "Hi"}], "reply": "Yo.", "verdict": "good"}'
    assert HTTP.post(f"{server.url}/feedback", content=body, headers=headers).status_code == 400
    assert not server.feedback.exists()


def test_the_api_key(server: Server) -> None:
    for authorization in ("", "Bearer", "Bearer wrong", f"Basic {KEY}", KEY, f"Bearer {KEY}x", "Bearer \xff"):
        headers = {"Authorization": authorization.encode("latin-1")}
        answer = HTTP.get(f"{server.url}/v1/models", headers=headers)
        assert answer.status_code == 401, authorization
        assert answer.json()["error"]["code"] == "invalid_api_key"
    for path in ("/v1/models", "/metrics", "/openapi.json"):
        assert status(server, path) == 401
        assert status(server, path, Authorization=f"Bearer {KEY}") == 200
    assert status(server, "/") == status(server, "/health") == 200
    assert HTTP.post(f"{server.url}/feedback", json={}).status_code == 401


def test_security_headers_of_every_response(server: Server) -> None:
    for path in ("/", "/nothing", "/health"):
        headers = HTTP.get(f"{server.url}{path}").headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["X-Frame-Options"] == "DENY"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert "Access-Control-Allow-Origin" not in headers


def test_the_key_is_compared_in_constant_time(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def never(given: bytes, key: bytes) -> bool:
        compared.append((given, key))
        return False

    monkeypatch.setattr("hmac.compare_digest", never)
    assert status(server, "/v1/models", Authorization=f"Bearer {KEY}") == 401  # nothing else lets it in
    assert compared == [(KEY.encode(), KEY.encode())]


@pytest.mark.parametrize(
    ("origins", "origin", "allowed"),
    [
        (["http://localhost:3000"], "http://localhost:3000", True),
        (["http://LOCALHOST:3000/"], "http://localhost:3000", True),
        (["http://localhost:3000"], "http://localhost:3001", False),
        (["http://localhost:3000"], "https://localhost:3000", False),
        (["*"], "https://app.example", True),
        ([], "http://localhost:3000", False),
    ],
)
def test_pages_of_allowed_origins(
    tokenizer: ChatTokenizer, tmp_path: Path, origins: list[str], origin: str, allowed: bool
) -> None:
    """A browser asks first, without the key, and then shows the page only responses that name its origin."""
    with serving(random_policy(tokenizer), tmp_path / "f", origins=origins, api_key=KEY) as server:
        url, asks = f"{server.url}/v1/models", {"Origin": origin, "Access-Control-Request-Method": "POST"}
        preflight = HTTP.options(url, headers={**asks, "Access-Control-Request-Headers": "authorization"})
        answer = HTTP.get(url, headers={"Origin": origin, "Authorization": f"Bearer {KEY}"})
        without_key = HTTP.get(url, headers={"Origin": origin})
    shown = [r.headers.get("Access-Control-Allow-Origin") == origin for r in (preflight, answer, without_key)]
    assert shown == [allowed] * 3
    statuses = [preflight.status_code, answer.status_code, without_key.status_code]
    assert statuses == ([204, 200, 401] if allowed else [403, 403, 403])
    if allowed:
        assert preflight.headers["Access-Control-Allow-Headers"] == "authorization"
        assert answer.headers["Cross-Origin-Resource-Policy"] == "cross-origin"
