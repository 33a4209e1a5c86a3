"""`HTTPReward`: scores from a web service."""

from __future__ import annotations

import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException, HTTPMessage
from typing import IO, Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from rlchat.conversation import Conversation
from rlchat.errors import at_least_one
from rlchat.rewards.base import Factor, Reply

_MAX_BYTES = 16 << 20
_MAX_WAIT = 60.0  # seconds, of a server that says when to try again
_TEMPORARY = (408, 425, 429)  # HTTP codes below 500 after which another attempt may succeed


class HTTPReward(Factor):
    """Scores that a web service computes, one POST request of JSON per batch.

    Request: ``{"items": [{"messages": [{"role": "user", "content": "…"}], "response": "…", "tokens": 12, "ended":
    true}, …]}``. ``messages`` is the prompt; ``tokens`` and ``ended`` are those of :class:`rlchat.rewards.Reply`.

    Response: status 200 and ``{"scores": [0.5, …]}``, one finite number per item, in the same order.

    A request is repeated after a timeout, a failed connection, and the statuses 408, 425, 429 and 5xx, with waits of
    ``backoff`` × 1, 2, 4, … seconds, or as long as ``Retry-After`` says, up to 60 s. Any other answer is an error at
    once; redirects are not followed. Each process of a distributed run sends requests for its own responses.

    Args:
        url: the address of the service, http or https.
        weight: of the factor.
        timeout: seconds until a request is given up.
        retries: the number of further attempts after the first.
        backoff: seconds before the second attempt.
        batch_size: responses per request.
        token_env: the environment variable with a token, sent as ``Authorization: Bearer TOKEN``. The token itself is
            written to no file.
        name: the name in logs and errors; by default ``http_reward``.

    Raises:
        UserError: for invalid options; when called, if the service cannot be reached or answers something else.
    """

    def __init__(
        self,
        url: str,
        weight: float = 1.0,
        timeout: float = 30.0,
        retries: int = 3,
        backoff: float = 0.5,
        batch_size: int = 64,
        token_env: str = "",
        name: str = "",
    ) -> None:
        super().__init__(weight)
        self._name = name
        self.url = url
        self.timeout = timeout
        self.retries = retries
        self.backoff = backoff
        self.batch_size = at_least_one("HTTPReward", "batch_size", batch_size)
        self.token_env = token_env
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise self.error(f"invalid url {url!r}: expected an address such as http://localhost:8000/score")
        if parts.username or parts.password:
            raise self.error("the url holds a password, which model files and logs would show; use token_env")
        if not 0 < timeout < math.inf or retries < 0 or not 0 <= backoff < math.inf:
            raise self.error(
                f"invalid options: timeout {timeout} must be above 0, retries {retries} and backoff {backoff} at "
                "least 0"
            )
        if token_env and not os.environ.get(token_env):
            raise self.error(f"the environment variable {token_env}, which token_env names, is not set")

    def __call__(self, prompts: Sequence[Conversation], replies: Sequence[Reply]) -> Tensor:
        """The service's scores, ``[batch]``."""
        items = [
            {
                "messages": [{"role": message.role, "content": message.text} for message in prompt.messages],
                "response": reply.text,
                "tokens": reply.tokens,
                "ended": reply.ended,
            }
            for prompt, reply in zip(prompts, replies, strict=True)
        ]
        scores: list[float] = []
        for start in range(0, len(items), self.batch_size):
            batch = items[start : start + self.batch_size]
            scores += self._scores(self._answer(json.dumps({"items": batch}).encode()), len(batch))
        return torch.tensor(scores, dtype=torch.float32)

    def _answer(self, body: bytes) -> bytes:
        """The service's answer to ``body``, after as many attempts as are needed and allowed."""
        attempts = self.retries + 1
        for attempt in range(attempts):
            try:
                return self._post(body)
            except _TemporaryError as error:
                if attempt + 1 == attempts:
                    tried = f"after {attempts} attempts" if attempts > 1 else "after 1 attempt"
                    raise self.error(f"{self.url} {error} {tried}; {error.fix}") from error
                time.sleep(max(error.wait, self.backoff * 2**attempt))
        raise AssertionError("unreachable")

    def _post(self, body: bytes) -> bytes:
        """One attempt. Raises :class:`_TemporaryError` where another may succeed."""
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "rlchat"}
        if self.token_env:
            headers["Authorization"] = f"Bearer {os.environ.get(self.token_env, '')}"
        request = urllib.request.Request(self.url, body, headers, method="POST")
        try:
            with urllib.request.build_opener(_NoRedirect).open(request, timeout=self.timeout) as answer:
                return self._read(answer)
        except urllib.error.HTTPError as error:
            with error:
                text = " ".join(error.read(200).decode("utf-8", "replace").split())
            what = f"answered HTTP {error.code} {error.reason}" + (f" ({text})" if text else "")
            fix = _fix_of_status(error.code, error.headers.get("Location"))
            if error.code >= 500 or error.code in _TEMPORARY:
                raise _TemporaryError(what, fix, _seconds(error.headers.get("Retry-After"))) from error
            raise self.error(f"{self.url} {what}; {fix}") from error
        except TimeoutError as error:
            raise self._too_late() from error
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise self._too_late() from error
            raise _TemporaryError(f"cannot be reached ({error.reason})", "start the service, or correct url") from error
        except (OSError, HTTPException) as error:
            what = f"broke off its answer ({type(error).__name__})"
            raise _TemporaryError(what, "see the log of the service") from error

    def _too_late(self) -> _TemporaryError:
        fix = f"raise timeout, or lower batch_size ({self.batch_size} responses per request)"
        return _TemporaryError(f"did not answer within {self.timeout:g} s", fix)

    def _read(self, answer: Any) -> bytes:
        """The whole answer. The timeout holds for all of it, because a socket's own holds for each part."""
        end = time.monotonic() + self.timeout
        parts = []
        size = 0
        while part := answer.read1(1 << 16):
            parts.append(part)
            size += len(part)
            if size > _MAX_BYTES:
                raise self.error(f"{self.url} answered more than {_MAX_BYTES >> 20} MiB; {_expected(self.batch_size)}")
            if time.monotonic() > end:
                raise TimeoutError
        return b"".join(parts)

    def _scores(self, answer: bytes, count: int) -> list[float]:
        try:
            found = json.loads(answer)
        except ValueError as error:
            raise self.error(f"{self.url} answered {_shown(answer)}, which is not JSON; {_expected(count)}") from error
        scores = found.get("scores") if isinstance(found, dict) else None
        if not isinstance(scores, list):
            raise self.error(f"{self.url} answered {_shown(answer)}; {_expected(count)}")
        if len(scores) != count:
            raise self.error(f"{self.url} answered {len(scores)} scores for {count} responses; {_expected(count)}")
        for row, score in enumerate(scores):
            if isinstance(score, bool) or not isinstance(score, int | float) or not _is_finite(score):
                raise self.error(f"{self.url} answered {json.dumps(score)} as score {row}; {_expected(count)}")
        return [float(score) for score in scores]


def _expected(count: int) -> str:
    """The right answer to a request with ``count`` responses, for an error."""
    more = ", ..." if count > 2 else ""
    example = ", ".join(["0.5", "-1"][:count])
    return f'expected {{"scores": [{example}{more}]}} with {count} finite number{"s" if count > 1 else ""}'


def _fix_of_status(code: int, location: str | None) -> str:
    """What the user can do about the HTTP status ``code``."""
    if 300 <= code < 400:
        return f"redirects are not followed, set url to {location or 'the address of the service itself'}"
    if code in (401, 403):
        return "set token_env to the name of an environment variable with a valid token"
    if code in (404, 405):
        return "set url to the address and path at which the service takes POST requests"
    if code == 413:
        return "lower batch_size, the number of responses per request"
    if code == 429:
        return "raise backoff or retries"
    if 400 <= code < 500 and code not in _TEMPORARY:
        return 'the service must take {"items": [{"messages": [...], "response": "...", "tokens": 12, "ended": true}]}'
    return "see the log of the service, or raise retries"


class _TemporaryError(Exception):
    """What went wrong in an attempt that may be repeated, and what the user can do if all fail.

    ``wait`` is the least number of seconds before the next attempt.
    """

    def __init__(self, what: str, fix: str, wait: float = 0.0) -> None:
        super().__init__(what)
        self.fix = fix
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, which urllib would follow with a GET request without the body."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:
        return None


def host_of(url: str) -> str:
    """The name of the host of ``url``; empty if it has none."""
    return urlsplit(url).hostname or ""


def _seconds(value: str | None) -> float:
    """The seconds of a ``Retry-After`` header; 0 without one, or if it is a date."""
    return min(float(value), _MAX_WAIT) if value is not None and value.strip().isdigit() else 0.0


def _is_finite(score: float) -> bool:
    try:
        return math.isfinite(score)
    except OverflowError:  # an integer that exceeds every float
        return False


def _shown(answer: bytes) -> str:
    text = answer[:100].decode("utf-8", "replace")
    return repr(text + "…" if len(answer) > 100 else text)
