"""`/v1/chat/completions`: OpenAI's chat completions."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Literal

from fastapi import FastAPI, Request, Response

from rlchat.server.engine import Finish, Piece
from rlchat.server.errors import APIError
from rlchat.server.logprobs import ChoiceLogprobs, ContentLogprob, TokenLogprob, TopLogprob, token_text
from rlchat.server.responses import EventStream, Replies, Service, fit_chat, json_response, unless_gone
from rlchat.server.schemas import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatRequest,
    Choice,
    ChunkChoice,
    Delta,
    ReplyMessage,
    Seen,
    new_id,
    now,
)
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

# One event of a stream, for the OpenAPI schema.
_EVENT_SCHEMA = {
    "type": "object",
    "properties": {"data": {"type": "string", "description": "A piece of the response, an error, or [DONE]."}},
    "required": ["data"],
}
MAY_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": _EVENT_SCHEMA}}}}
"""For ``responses`` of an endpoint whose answer may be a stream of events."""


def add_chat_completions(app: FastAPI, service: Service) -> None:
    """Add the endpoint to ``app``."""

    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses=MAY_STREAM,
    )
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Respond to a conversation."""
        service.check(body)
        first_piece = service.timer()
        prompt, seen = await fit_chat(service, body)
        replies = Replies.start(service, [prompt], body, logprobs=body.top)
        if body.stream:
            return EventStream(replies, _events(replies, seen, service, body, first_piece))
        return await unless_gone(request, replies, _whole(replies, seen, service, body, first_piece))


async def _whole(
    replies: Replies, seen: Seen, service: Service, body: ChatRequest, first_piece: Callable[[], None]
) -> Response:
    """All responses in one body."""
    pieces = await replies.collect()
    first_piece()
    choices = [
        Choice(
            index=choice,
            message=ReplyMessage(content=piece.text),
            finish_reason=finish_reason(piece.finish),
            logprobs=_logprobs(service.engine.tokenizer, piece.logprobs) if body.logprobs else None,
        )
        for choice, piece in enumerate(pieces)
    ]
    completion = ChatCompletion(
        model=service.model.id,
        choices=choices,
        usage=replies.usage,
        rlchat=seen,
        system_fingerprint=replies.version,
    )
    return json_response(completion, replies.version)


async def _events(
    replies: Replies, seen: Seen, service: Service, body: ChatRequest, first_piece: Callable[[], None]
) -> AsyncIterator[str]:
    """The responses as server-sent events: JSON chunks, then ``[DONE]``."""
    stamp: dict[str, Any] = {
        "id": new_id(),
        "object": "chat.completion.chunk",
        "created": now(),
        "model": service.model.id,
        "system_fingerprint": replies.version,
    }

    def event(*choices: ChunkChoice, **more: Any) -> str:
        chunk = ChatCompletionChunk(**stamp, choices=list(choices), **more)
        return f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n"

    def part(choice: int, piece: Piece) -> ChunkChoice:
        delta = Delta(content=piece.text) if piece.text else Delta()
        more = {"logprobs": _logprobs(service.engine.tokenizer, piece.logprobs)} if body.logprobs else {}
        return ChunkChoice(index=choice, delta=delta, finish_reason=None, **more)

    for choice in range(len(replies)):
        opening = Delta(role="assistant", content="")
        yield event(ChunkChoice(index=choice, delta=opening, finish_reason=None), rlchat=seen)
    try:
        async for choice, piece in replies:
            first_piece()
            if piece.text:
                yield event(part(choice, piece))
            if piece.finish is not None:
                yield event(ChunkChoice(index=choice, delta=Delta(), finish_reason=finish_reason(piece.finish)))
    except APIError as error:  # the status was already sent
        yield f"data: {json.dumps(error.body)}\n\n"
        return
    if body.wants_usage:
        yield event(usage=replies.usage)
    yield "data: [DONE]\n\n"


def _logprobs(tokenizer: ChatTokenizer, found: Sequence[TokenLogprob]) -> ChoiceLogprobs:
    """In OpenAI's format. The end marker is left out, so that the tokens spell the response."""

    def top(token: int, logprob: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token)
        text = raw.decode("utf-8", errors="replace") if raw else token_text(tokenizer, token)
        return {"token": text, "bytes": list(raw), "logprob": logprob}

    return ChoiceLogprobs(
        content=[
            ContentLogprob(**top(one.token, one.logprob), top_logprobs=[TopLogprob(**top(*other)) for other in one.top])
            for one in found
            if one.token != tokenizer.end_id
        ]
    )


def finish_reason(finish: Finish | None) -> Literal["stop", "length"]:
    """The reason why a response ended, in OpenAI's terms."""
    assert finish in ("stop", "length"), finish
    return finish
