"""`/v1/responses`: the subset of OpenAI's responses that applies here. Text in, text out; nothing is stored."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, ClassVar, Literal

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ConfigDict, Field, field_validator

from rlchat.server.chat_api import MAY_STREAM
from rlchat.server.engine import Piece
from rlchat.server.errors import APIError
from rlchat.server.responses import EventStream, Replies, Service, fit_chat, json_response, unless_gone
from rlchat.server.schemas import (
    NEUTRAL,
    ChatMessage,
    ChatRequest,
    GenerationRequest,
    Seen,
    TextPart,
    check_text_or_parts,
    ends_with_user,
    new_id,
    now,
)

_NOT_STORED = "this server stores no responses, send the whole conversation as input"


class InputPart(BaseModel):
    """A part of a message; only text is supported."""

    model_config = ConfigDict(extra="allow")

    type: Literal["input_text", "output_text", "text"]
    text: str


class InputMessage(BaseModel):
    """One message of the input."""

    model_config = ConfigDict(extra="allow")

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputPart]

    @field_validator("content", mode="before")
    @classmethod
    def _check_content(cls, content: Any) -> Any:
        check_text_or_parts(content)
        for part in content:
            if isinstance(part, dict) and part.get("type") not in ("input_text", "output_text", "text"):
                raise ValueError(f"only text parts are supported, got {part.get('type')!r}")
        return content

    def to_chat(self) -> ChatMessage:
        """The message as in a chat completion."""
        if isinstance(self.content, str):
            return ChatMessage(role=self.role, content=self.content)
        return ChatMessage(role=self.role, content=[TextPart(type="text", text=part.text) for part in self.content])


class ResponseRequest(GenerationRequest):
    """A conversation that ends with a user message, and options for the response."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        **NEUTRAL,
        "previous_response_id": (None,),
        "conversation": (None,),
        "prompt": (None,),
        "background": (None, False),
        "include": (None, []),
        "text": (None, {}, {"format": {"type": "text"}}, {"format": {"type": "text"}, "verbosity": "medium"}),
        "reasoning": (None, {}, {"effort": None}, {"effort": "none"}),
        "max_tool_calls": (None,),
        "context_management": (None, []),
        "logprobs": (None, False),
        "top_logprobs": (None, 0),
        "max_tokens": (None,),
        "max_completion_tokens": (None,),
        "messages": (None,),
    }
    hints: ClassVar[dict[str, str]] = {
        "previous_response_id": _NOT_STORED,
        "conversation": _NOT_STORED,
        "prompt": "send the text as input",
        "background": "remove it, or set stream",
        "logprobs": "use /v1/chat/completions",
        "top_logprobs": "use /v1/chat/completions",
        "max_tokens": "use max_output_tokens",
        "max_completion_tokens": "use max_output_tokens",
        "messages": "use input",
    }

    n: Literal[1] | None = None
    input: Annotated[str, Field(min_length=1)] | Annotated[list[InputMessage], Field(min_length=1)]
    instructions: str | None = Field(default=None, description="A system message before the input.")
    max_output_tokens: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Maximum number of tokens; the server and the context may allow fewer."
    )
    truncation: Literal["auto", "disabled"] | None = Field(
        default=None,
        description="What to do with an input that does not fit: disabled rejects it. The default, auto, drops "
        "the oldest messages.",
    )

    @field_validator("input", mode="before")
    @classmethod
    def _check_input(cls, items: Any) -> Any:
        """Runs before pydantic checks the union of types, whose error would name the type that was tried first."""
        if not isinstance(items, str | list):
            raise ValueError("expected a string or a list of messages")
        for number, item in enumerate(items if isinstance(items, list) else []):
            if isinstance(item, dict) and item.get("type", "message") != "message":
                raise ValueError(f"item {number} is {item['type']!r}: only messages with text are supported")
        return items

    @field_validator("input")
    @classmethod
    def _check_end(cls, items: str | list[InputMessage]) -> str | list[InputMessage]:
        ends_with_user([_as_messages(items)[-1]])
        return items

    def to_chat(self) -> ChatRequest:
        """The same request as a chat completion."""
        messages = _as_messages(self.input)
        if self.instructions:
            first = messages[0]
            system = [self.instructions]
            if first.role in ("system", "developer"):  # one system message, which is kept when the context is full
                system.append(first.to_message().text)
                messages = messages[1:]
            messages = [ChatMessage(role="system", content="\n\n".join(system)), *messages]
        return ChatRequest(
            messages=messages,
            max_completion_tokens=self.max_output_tokens,
            **self.model_dump(include={"temperature", "top_p", "top_k", "seed", "stop", "stream"}),
        )


def _as_messages(items: str | list[InputMessage]) -> list[ChatMessage]:
    if isinstance(items, str):
        return [ChatMessage(role="user", content=items)]
    return [item.to_chat() for item in items]


class OutputText(BaseModel):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = []


class OutputMessage(BaseModel):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]


class ResponseUsage(BaseModel):
    """Token counts."""

    input_tokens: int
    input_tokens_details: dict[str, int] = {"cached_tokens": 0, "cache_write_tokens": 0}
    output_tokens: int
    output_tokens_details: dict[str, int] = {"reasoning_tokens": 0}
    total_tokens: int


class ResponseObject(BaseModel):
    """A response, complete or in progress."""

    id: str
    object: Literal["response"] = "response"
    created_at: int = Field(default_factory=now)
    status: Literal["in_progress", "completed", "incomplete", "failed"] = "in_progress"
    error: dict[str, str] | None = None
    incomplete_details: dict[str, str] | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, Any] = {}
    model: str
    output: list[OutputMessage] = []
    parallel_tool_calls: bool = False
    previous_response_id: None = None
    store: Literal[False] = False
    temperature: float | None = None
    text: dict[str, Any] = {"format": {"type": "text"}}
    tool_choice: Literal["none"] = "none"
    tools: list[Any] = []
    top_p: float | None = None
    truncation: Literal["auto", "disabled"] = "auto"
    usage: ResponseUsage | None = None
    rlchat: Seen


def add_responses(app: FastAPI, service: Service) -> None:
    """Add the endpoint to ``app``."""

    @app.post(
        "/v1/responses",
        response_model=ResponseObject,
        responses=MAY_STREAM,
    )
    async def responses(body: ResponseRequest, request: Request) -> Response:
        """Respond to a conversation."""
        service.check(body)
        first_piece = service.timer()
        chat = body.to_chat()
        prompt, seen = await fit_chat(service, chat)
        if body.truncation == "disabled" and (seen.dropped_messages or seen.cut_tokens or seen.dropped_system):
            raise APIError(
                400,
                f"the input does not fit into the model's context of {service.model.max_length} tokens: shorten it, "
                "or set truncation to auto",
                param="input",
                code="context_length_exceeded",
            )
        replies = Replies.start(service, [prompt], chat)
        opened = ResponseObject(
            id=new_id("resp_"),
            model=service.model.id,
            rlchat=seen,
            truncation=body.truncation or "auto",
            **body.model_dump(include={"instructions", "max_output_tokens", "temperature", "top_p"}),
        )
        if body.stream:
            return EventStream(replies, _events(replies, opened, first_piece))

        async def answer() -> Response:
            (piece,) = await replies.collect()
            first_piece()
            return json_response(_finished(opened, new_id("msg_"), piece, replies), replies.version)

        return await unless_gone(request, replies, answer())


def _finished(opened: ResponseObject, message_id: str, piece: Piece, replies: Replies) -> ResponseObject:
    """The response at its end, with the text of ``piece``."""
    is_cut = piece.finish == "length"
    status: Literal["completed", "incomplete"] = "incomplete" if is_cut else "completed"
    usage = replies.usage
    return opened.model_copy(
        update={
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": [OutputMessage(id=message_id, status=status, content=[OutputText(text=piece.text)])],
            "usage": ResponseUsage(
                input_tokens=usage.prompt_tokens,
                output_tokens=usage.completion_tokens,
                total_tokens=usage.total_tokens,
            ),
        }
    )


async def _events(replies: Replies, opened: ResponseObject, first_piece: Callable[[], None]) -> AsyncIterator[str]:
    """The response as the server-sent events of OpenAI's API."""
    numbers = itertools.count()

    def event(kind: str, **fields: Any) -> str:
        data = _Event(type=kind, sequence_number=next(numbers), **fields).model_dump_json()
        return f"event: {kind}\ndata: {data}\n\n"

    item = OutputMessage(id=new_id("msg_"), status="in_progress", content=[])
    place = {"item_id": item.id, "output_index": 0, "content_index": 0}
    yield event("response.created", response=opened)
    yield event("response.in_progress", response=opened)
    yield event("response.output_item.added", output_index=0, item=item)
    yield event("response.content_part.added", **place, part=OutputText(text=""))
    whole = Piece("", 0)
    try:
        async for _, piece in replies:
            first_piece()
            whole = piece._replace(text=whole.text + piece.text)
            if piece.text:
                yield event("response.output_text.delta", **place, delta=piece.text, logprobs=[])
    except APIError as error:  # the status was already sent
        failed = {"status": "failed", "error": {"code": "server_error", "message": error.message}}
        yield event("response.failed", response=opened.model_copy(update=failed))
        return
    finished = _finished(opened, item.id, whole, replies)
    (message,) = finished.output
    yield event("response.output_text.done", **place, text=whole.text, logprobs=[])
    yield event("response.content_part.done", **place, part=message.content[0])
    yield event("response.output_item.done", output_index=0, item=message)
    yield event(f"response.{finished.status}", response=finished)


class _Event(BaseModel):
    """One event; its further fields depend on its type."""

    model_config = ConfigDict(extra="allow")

    type: str
    sequence_number: int
