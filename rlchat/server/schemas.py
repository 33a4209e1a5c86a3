"""Requests and responses of the API, in the format of OpenAI's chat completions; FastAPI derives the OpenAPI schema."""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    ValidationInfo,
    field_validator,
)

from rlchat.conversation import Conversation, Message, Role
from rlchat.server.logprobs import MAX_TOP, ChoiceLogprobs

MAX_CHOICES = 16
MAX_STOPS = 16
FileName = Annotated[str, Field(pattern=r"^[^/\\\x00-\x1f]{1,256}$")]
JUDGED_FILE = "The model file of the response, as in its system_fingerprint. Default: the active one."
FINGERPRINT = "The name of the model file that generated the response: of the model, or of a version of it."


def _check_stop(value: Any) -> Any:
    """Runs before pydantic checks the union of types, whose error would name the type that was tried first."""
    strings = value if isinstance(value, list) else [value]
    if len(strings) > MAX_STOPS:
        raise ValueError(f"expected at most {MAX_STOPS} stop strings, got {len(strings)}")
    if value is not None and not all(isinstance(string, str) and 1 <= len(string) <= 256 for string in strings):
        raise ValueError("expected a string of 1 to 256 characters, or a list of such strings")
    return value


StopText = Annotated[str, Field(min_length=1, max_length=256)]

# Options of OpenAI's API and of similar servers that would change the response and that this server does not support,
# with the values that have no effect. Other values are rejected. Unknown options (user, metadata, store, …) are
# ignored.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "functions": (None, []),
    "tool_choice": (None, "none", "auto"),
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
    **dict.fromkeys(("dry_multiplier", "xtc_probability", "dynatemp_range", "smoothing_factor"), (None, 0)),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "penalty_alpha"), (None, 0)),
    "top_n_sigma": (None, -1, 0),
    "guidance_scale": (None, 1),
    "allowed_token_ids": (None, []),
    "grammar": (None, ""),
    "json_schema": (None, {}),
    "structured_outputs": (None, {}),
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), (None,)),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
}


class TextPart(BaseModel):
    """A part of a message; only text is supported."""

    type: Literal["text"]
    text: str


def check_text_or_parts(content: Any) -> None:
    """Raises ValueError for content of another type. The error of a union would name the type that was tried first."""
    if not isinstance(content, str | list):
        shown = "null" if content is None else type(content).__name__
        raise ValueError(f"expected a string or a list of text parts, got {shown}")


class ChatMessage(BaseModel):
    """One message."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @field_validator("content", mode="before")
    @classmethod
    def _check_content(cls, content: Any) -> Any:
        check_text_or_parts(content)
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


def ends_with_user(messages: list[ChatMessage]) -> list[ChatMessage]:
    """``messages``; raises ValueError unless the last one is a user message with text."""
    last = messages[-1].to_message()
    if last.role != "user" or not last.text.strip():
        raise ValueError("must end with a user message that is not empty")
    return messages


class GenerationRequest(BaseModel):
    """Options that all generation requests have in common."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str | None = Field(default=None, description="As listed by /v1/models. Optional.")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        default=None, description="0: always the most likely token; 1: the model's distribution. Default: 0.7."
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

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = NEUTRAL
    hints: ClassVar[dict[str, str]] = {}  # alternatives to options that are not supported

    @property
    def unsupported_option(self) -> str | None:
        """The name of an option that would have to be ignored; None if there is none."""
        extra = (self.model_extra or {}).items()
        return next((name for name, value in extra if name in self.neutral and value not in self.neutral[name]), None)

    @property
    def stop_strings(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(GenerationRequest):
    """A conversation that ends with a user message, and options for the response."""

    continue_final_message: StrictBool | None = Field(
        default=None,
        description="The last message is the beginning of the response, which is continued. Not part of OpenAI's API.",
    )
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="Maximum number of tokens per response; the server and the context may allow fewer.",
    )
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Older name of max_completion_tokens."
    )
    logprobs: StrictBool | None = Field(
        default=None,
        description="Return the log-prob of each token, under the model before temperature, top_k and top_p.",
    )
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = Field(
        default=None, description="Return the log-probs of this many of the most likely tokens; requires logprobs."
    )

    @field_validator("messages")
    @classmethod
    def _check_messages(cls, messages: list[ChatMessage], info: ValidationInfo) -> list[ChatMessage]:
        if not info.data.get("continue_final_message"):
            return ends_with_user(messages)
        if messages[-1].role != "assistant" or len(messages) < 2:
            raise ValueError("must end with the assistant message to continue")
        ends_with_user(messages[:-1])
        return messages

    @field_validator("top_logprobs")
    @classmethod
    def _check_top_logprobs(cls, top: int | None, info: ValidationInfo) -> int | None:
        if top and not info.data.get("logprobs"):
            raise ValueError("requires logprobs: true")
        return top

    @property
    def tokens_asked(self) -> int | None:
        """The maximum number of tokens per response; None if it is not set."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def top(self) -> int | None:
        """The number of most likely tokens to return with each token; None for no log-probs."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def conversation(self) -> Conversation:
        """The messages as a conversation."""
        return Conversation(tuple(message.to_message() for message in self.messages))


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
    logprobs: ChoiceLogprobs | None = None


def new_id(kind: str = "chatcmpl-") -> str:
    """A unique id for a response."""
    return f"{kind}{uuid.uuid4().hex}"


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())


class ChatCompletion(BaseModel):
    """A complete response."""

    id: str = Field(default_factory=new_id)
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(default_factory=now)
    model: str
    choices: list[Choice]
    usage: Usage
    rlchat: Seen
    system_fingerprint: str = Field(description=FINGERPRINT)


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    index: int
    delta: Delta
    finish_reason: Literal["stop", "length"] | None = None
    logprobs: ChoiceLogprobs | None = None


class ChatCompletionChunk(BaseModel):
    """A piece of a streamed response."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    rlchat: Seen | None = None
    system_fingerprint: str = Field(description=FINGERPRINT)


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["rlchat"] = "rlchat"
    file: str = Field(description="The name of the model file, as in feedback. Not part of OpenAI's API.")
    max_length: int = Field(
        description="Maximum number of tokens of prompt and response together. Not part of OpenAI's API."
    )
    has_reward: bool = Field(
        default=False, description="Whether /reward can score responses. Not part of OpenAI's API."
    )
    learns: bool = Field(default=False, description="Whether there is /learning. Not part of OpenAI's API.")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class RatedReply(BaseModel):
    """A response and the conversation that it responds to."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)] = Field(
        description="The conversation up to the user message."
    )
    reply: str

    @field_validator("messages")
    @classmethod
    def _check_messages(cls, messages: list[ChatMessage]) -> list[ChatMessage]:
        return ends_with_user(messages)

    @property
    def prompt(self) -> Conversation:
        """The messages as a conversation."""
        return Conversation(tuple(message.to_message() for message in self.messages))


class RewardRequest(RatedReply):
    """A response to score."""

    ended: StrictBool = Field(default=True, description="False if the response was truncated by a limit.")
    model: FileName | None = Field(default=None, description=JUDGED_FILE)


class RewardReply(BaseModel):
    """The reward of a response."""

    reward: float
    factors: dict[str, float] = Field(description="The weighted score of each factor; their sum is the reward.")
    value: float | None = Field(description="The critic's value of the prompt; null if there is no trained critic.")
    left_out: dict[str, str] = Field(description="The factors that cannot be computed here, and why.")
    model: str = Field(description="The model file whose reward it is.")


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(BaseModel):
    """An error in the format of OpenAI's API."""

    error: ErrorDetail
