"""Errors of the API, in the format of OpenAI's API."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class APIError(Exception):
    """An error response with the HTTP status ``status`` and a message of one sentence."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        # Quoted parts of the request may hold lone surrogates, which UTF-8 cannot encode.
        self.message = message.encode("utf-8", errors="replace").decode()
        self.param = param
        self.code = code
        self.headers = headers

    @property
    def body(self) -> dict[str, Any]:
        """The error as JSON values."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        """The error as an HTTP response."""
        return JSONResponse(self.body, status_code=self.status, headers=self.headers)

    async def answer(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the error, for requests that do not reach the application."""
        await self.response(scope, receive, send)
