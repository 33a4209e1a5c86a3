"""What goes in and out of the API, in the words of OpenAI's chat completions; FastAPI describes it from these."""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, field_validator, model_validator

from rlchat.conversation import Conversation, Message, Role

MAX_CHOICES = 16
MAX_STOPS = 16

StopText = Annotated[str, Field(min_length=1, max_length=256)]

# Options of the protocol that would change the reply and that this server does not have: refused, not ignored, unless
# they say what happens anyway. Others that it does not know (user, metadata, store, …) change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "functions": (None, []),
    "tool_choice": (None, "none", "auto"),
    "logprobs": (None, False),
    "logit_bias": (None, {}),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
}


class TextPart(BaseModel):
    """A part of a message; only text is understood."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @field_validator("content", mode="before")
    @classmethod
    def _refuse_what_is_no_text(cls, content: Any) -> Any:
        """Before the types are tried, which would tell of each how it does not fit."""
        parts = content if isinstance(content, list) else []
        if any(isinstance(part, dict) and part.get("type") != "text" for part in parts):
            raise ValueError("only text parts are understood")
        return content

    def to_message(self) -> Message:
        """The message of the conversation; ``developer`` is the protocol's newer word for system."""
        role: Role = "system" if self.role == "developer" else self.role
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(role, text)


class StreamOptions(BaseModel):
    """Of a reply that is streamed."""

    include_usage: StrictBool = Field(default=False, description="A last chunk, without choices, counts the tokens.")


class ChatRequest(BaseModel):
    """A conversation that ends on a user's message, and how to reply to it."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    model: str | None = Field(default=None, description="As listed under /v1/models; may be left out.")
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="Tokens of a reply at most; what the server or the context allows, where that is less.",
    )
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(default=None, description="The older name of the same.")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        default=None, description="0 takes the likeliest token, 1 samples as trained; 0.7 where it is not given."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="Sample from the likeliest tokens that together have this probability."
    )
    top_k: Annotated[int, Field(ge=0, le=2**31)] | None = Field(
        default=None, description="Sample from this many of the likeliest tokens; 0 for all. No part of the protocol."
    )
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = Field(default=None, description="How many replies.")
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = Field(
        default=None, description="The same seed gives the same reply, whoever else is being replied to."
    )
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = Field(
        default=None, description="The reply ends before the first of these strings."
    )
    stream: StrictBool | None = Field(default=None, description="Send the reply in pieces, as server-sent events.")
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _refuse_what_would_be_ignored(self) -> ChatRequest:
        for name, value in (self.model_extra or {}).items():
            if name in _NEUTRAL and value not in _NEUTRAL[name]:
                raise ValueError(f"{name} is not to be had from this server; leave it out")
        return self

    @model_validator(mode="after")
    def _require_a_question(self) -> ChatRequest:
        last = self.messages[-1].to_message()
        if last.role != "user" or not last.text.strip():
            raise ValueError("messages must end on a user's message that is not empty")
        return self

    @property
    def conversation(self) -> Conversation:
        """What is to be replied to."""
        return Conversation(tuple(message.to_message() for message in self.messages))

    @property
    def stop_strings(self) -> list[str]:
        """The strings that end a reply, none or some."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class Usage(BaseModel):
    """Counts of tokens, over all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Seen(BaseModel):
    """What of the conversation did not fit into the model's context: whole messages, tokens of the last one."""

    dropped_messages: int
    cut_tokens: int


class ReplyMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    index: int
    message: ReplyMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


def new_id() -> str:
    """A name for an answer that no other has."""
    return f"chatcmpl-{uuid.uuid4().hex}"


def _now() -> int:
    return int(time.time())


class ChatCompletion(BaseModel):
    """A whole answer."""

    id: str = Field(default_factory=new_id)
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(default_factory=_now)
    model: str
    choices: list[Choice]
    usage: Usage
    rlchat: Seen


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    index: int
    delta: Delta
    finish_reason: Literal["stop", "length"] | None = None
    logprobs: None = None


class ChatCompletionChunk(BaseModel):
    """A piece of an answer that is streamed."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    rlchat: Seen | None = None


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["rlchat"] = "rlchat"
    file: str = Field(description="The name of the bundle's file, as feedback has it. No part of the protocol.")
    max_length: int = Field(description="Tokens of prompt and reply together. No part of the protocol.")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class FeedbackRequest(BaseModel):
    """What somebody thinks of a reply: a verdict, or what the model should have said."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)] = Field(description="Up to the user's message.")
    reply: str
    verdict: Literal["good", "bad"] | None = None
    correction: str | None = None

    @model_validator(mode="after")
    def _require_one(self) -> FeedbackRequest:
        if (self.verdict is None) == (self.correction is None):
            raise ValueError("give either a verdict or a correction")
        last = self.messages[-1].to_message()
        if last.role != "user" or not last.text.strip():
            raise ValueError("messages must end on the user's message that was replied to")
        return self


class FeedbackKept(BaseModel):
    kept: Literal[True] = True


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(BaseModel):
    """What went wrong, as clients of OpenAI's API expect it."""

    error: ErrorDetail
