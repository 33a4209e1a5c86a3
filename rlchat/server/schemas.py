"""Requests and responses of the API, in the format of OpenAI's chat completions; FastAPI derives the OpenAPI schema."""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, field_validator, model_validator

from rlchat.conversation import Conversation, Message, Role

MAX_CHOICES = 16
MAX_STOPS = 16


def _check_stop(value: Any) -> Any:
    """Checked before the union of types, whose error would name the type that was tried first."""
    strings = value if isinstance(value, list) else [value]
    if len(strings) > MAX_STOPS:
        raise ValueError(f"expected at most {MAX_STOPS} stop strings, got {len(strings)}")
    if value is not None and not all(isinstance(string, str) and 1 <= len(string) <= 256 for string in strings):
        raise ValueError("expected a string of 1 to 256 characters, or a list of such strings")
    return value


StopText = Annotated[str, Field(min_length=1, max_length=256)]

# Options of OpenAI's API and of similar servers that would change the response and that this server does not support,
# with the values that change nothing. Other values are refused. Unknown options (user, metadata, store, …) are ignored.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "functions": (None, []),
    "tool_choice": (None, "none", "auto"),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "repetition_penalty": (None, 1),
    "repeat_penalty": (None, 1),
    "length_penalty": (None, 1),
    "no_repeat_ngram_size": (None, 0),
    "min_p": (None, 0),
    "typical_p": (None, 1),
    "top_a": (None, 0),
    "tfs_z": (None, 1),
    "mirostat": (None, 0),
    "min_tokens": (None, 0),
    "ignore_eos": (None, False),
    "stop_token_ids": (None, []),
    "bad_words": (None, []),
    "best_of": (None, 1),
    "use_beam_search": (None, False),
    "num_beams": (None, 1),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
}


class TextPart(BaseModel):
    """A part of a message; only text is supported."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @field_validator("content", mode="before")
    @classmethod
    def _check_content(cls, content: Any) -> Any:
        """Checked before the union of types, whose error would name the type that was tried first."""
        if not isinstance(content, str | list):
            shown = "null" if content is None else type(content).__name__
            raise ValueError(f"expected a string or a list of text parts, got {shown}")
        if any(isinstance(part, dict) and part.get("type") != "text" for part in content):
            raise ValueError("only text parts are supported")
        return content

    def to_message(self) -> Message:
        """The message of a conversation; ``developer`` is OpenAI's newer name for system."""
        role: Role = "system" if self.role == "developer" else self.role
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(role, text)


class StreamOptions(BaseModel):
    """Options of a streamed response."""

    include_usage: StrictBool = Field(
        default=False, description="Send the token counts in a last chunk without choices."
    )


def _ends_with_user(messages: list[ChatMessage]) -> list[ChatMessage]:
    last = messages[-1].to_message()
    if last.role != "user" or not last.text.strip():
        raise ValueError("must end with a user message that is not empty")
    return messages


class ChatRequest(BaseModel):
    """A conversation that ends with a user message, and options for the response."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    model: str | None = Field(default=None, description="As listed by /v1/models. Optional.")
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="Maximum number of tokens per response; the server and the context may allow fewer.",
    )
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Older name of max_completion_tokens."
    )
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        default=None, description="0 takes the most likely token, 1 samples as trained. Default: 0.7."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="Sample from the most likely tokens with this total probability."
    )
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = Field(
        default=None,
        description="Sample from this many of the most likely tokens; 0 or -1 for all. Not part of OpenAI's API.",
    )
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = Field(default=None, description="Number of responses.")
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = Field(
        default=None,
        description="The same seed gives the same response, up to floating-point rounding when other requests run.",
    )
    stop: Annotated[
        StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None, BeforeValidator(_check_stop)
    ] = Field(default=None, description="The response ends before the first of these strings.")
    stream: StrictBool | None = Field(default=None, description="Send the response in pieces, as server-sent events.")
    stream_options: StreamOptions | None = None

    @field_validator("messages")
    @classmethod
    def _check_messages(cls, messages: list[ChatMessage]) -> list[ChatMessage]:
        return _ends_with_user(messages)

    @property
    def unsupported_option(self) -> str | None:
        """The name of an option that would have to be ignored; None if there is none."""
        extra = (self.model_extra or {}).items()
        return next((name for name, value in extra if name in _NEUTRAL and value not in _NEUTRAL[name]), None)

    @property
    def conversation(self) -> Conversation:
        """The messages as a conversation."""
        return Conversation(tuple(message.to_message() for message in self.messages))

    @property
    def stop_strings(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class Usage(BaseModel):
    """Token counts; those of the response are summed over all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Seen(BaseModel):
    """What did not fit into the model's context: oldest messages, tokens of the last one, the system message."""

    dropped_messages: int
    cut_tokens: int
    dropped_system: bool = False


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
    """A unique id for a response."""
    return f"chatcmpl-{uuid.uuid4().hex}"


def _now() -> int:
    return int(time.time())


class ChatCompletion(BaseModel):
    """A complete response."""

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
    """A piece of a streamed response."""

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
    file: str = Field(description="The name of the model file, as in feedback. Not part of OpenAI's API.")
    max_length: int = Field(
        description="Maximum number of tokens of prompt and response together. Not part of OpenAI's API."
    )


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class FeedbackRequest(BaseModel):
    """A verdict on a response (none: withdraw it), or a corrected response."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)] = Field(
        description="The conversation up to the user message."
    )
    reply: str
    verdict: Literal["good", "bad", "none"] | None = None
    correction: str | None = None

    @model_validator(mode="after")
    def _require_one(self) -> FeedbackRequest:
        if (self.verdict is None) == (self.correction is None):
            raise ValueError("expected either a verdict or a correction")
        return self

    @field_validator("messages")
    @classmethod
    def _check_messages(cls, messages: list[ChatMessage]) -> list[ChatMessage]:
        return _ends_with_user(messages)


class FeedbackKept(BaseModel):
    kept: Literal[True] = True


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(BaseModel):
    """An error in the format of OpenAI's API."""

    error: ErrorDetail
