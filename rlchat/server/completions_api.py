"""`/v1/completions`: OpenAI's older completions, which continue a raw text.

To the model, the prompt is the beginning of a response without a user message, as in training on ``{"text": …}`` rows:
after the marker that opens a response. A prompt of token ids that starts with a control token is used as it is. With
``echo`` and ``logprobs``, the prompt is scored, which programs like lm_eval use to compare answers.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, Field, StrictBool, StrictInt, StrictStr, field_validator

from rlchat.conversation import Conversation
from rlchat.errors import UserError
from rlchat.server.chat_api import MAY_STREAM, finish_reason
from rlchat.server.engine import EngineFullError, Loaded, Piece
from rlchat.server.errors import APIError
from rlchat.server.logprobs import MAX_TOP, TokenLogprob, prompt_logprobs, token_text
from rlchat.server.responses import EventStream, Prompt, Replies, Service, engine_full, json_response, unless_gone
from rlchat.server.schemas import FINGERPRINT, NEUTRAL, GenerationRequest, Usage, new_id, now
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

MAX_PROMPTS = 64
_USUAL_MAX_TOKENS = 16  # OpenAI's default

Ids = Annotated[list[StrictInt], Field(min_length=1)]


class CompletionRequest(GenerationRequest):
    """Texts to continue, and options."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        **NEUTRAL,
        "suffix": (None, ""),
        "top_logprobs": (None, 0),
        "prompt_logprobs": (None,),
    }
    hints: ClassVar[dict[str, str]] = {
        "top_logprobs": "set logprobs to a number",
        "prompt_logprobs": "set echo and logprobs",
    }

    prompt: (
        StrictStr
        | Ids
        | Annotated[list[StrictStr], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[Ids], Field(min_length=1, max_length=MAX_PROMPTS)]
    ) = Field(description="A string, token ids of this model, or a list of either.")
    max_tokens: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description=f"Maximum number of tokens per response. Default: {_USUAL_MAX_TOKENS}."
    )
    echo: StrictBool | None = Field(default=None, description="Return the prompt too, before the response.")
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = Field(
        default=None,
        description="Return the log-prob of each token and of this many of the most likely ones, under the model "
        "before temperature, top_k and top_p.",
    )

    @field_validator("prompt", mode="before")
    @classmethod
    def _check_prompt(cls, prompt: Any) -> Any:
        """Runs before pydantic checks the union of types, whose error would name the type that was tried first."""
        if isinstance(prompt, list) and len(prompt) > MAX_PROMPTS and not isinstance(prompt[0], int):
            raise ValueError(f"expected at most {MAX_PROMPTS} prompts, got {len(prompt)}")
        many = prompt if isinstance(prompt, list) and prompt else [prompt]
        is_texts, is_lists = (all(map(kind, many)) for kind in (lambda one: isinstance(one, str), _is_ids))
        if not (is_texts or is_lists or _is_ids(prompt)):
            raise ValueError("expected a string, a list of token ids, or a list of either")
        return prompt

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else list(self.prompt)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)


class CompletionLogprobs(BaseModel):
    """The log-probs of tokens; null for a first token without context."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    finish_reason: Literal["stop", "length"] | None = None
    logprobs: CompletionLogprobs | None = None


class Completion(BaseModel):
    """A complete response, or a piece of a streamed one."""

    id: str = Field(default_factory=lambda: new_id("cmpl-"))
    object: Literal["text_completion"] = "text_completion"
    created: int = Field(default_factory=now)
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    system_fingerprint: str = Field(description=FINGERPRINT)


@dataclass(frozen=True, slots=True)
class _Raw:
    """A prompt: its text, its ids, and the ids before it."""

    text: str
    ids: list[int]
    before: list[int]


def add_completions(app: FastAPI, service: Service) -> None:
    """Add the endpoint to ``app``."""

    @app.post(
        "/v1/completions",
        response_model=Completion,
        responses=MAY_STREAM,
    )
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue texts; with echo and logprobs, score them."""
        service.check(body)
        first_piece = service.timer()
        max_tokens = _USUAL_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        raws = await run_in_threadpool(_read_prompts, service, body, min(max_tokens, 1))
        loaded = service.engine.loaded
        echoes = await _echoes(service, body, raws, loaded)
        prompts = [
            Prompt([*raw.before, *raw.ids], min(max_tokens, service.model.max_length - len(raw.before + raw.ids)))
            for raw in raws
        ]
        if not max_tokens:
            pieces = [Piece("", 0, "length")] * (len(raws) * (body.n or 1))
            first_piece()
            count = sum(len(prompt.ids) for prompt in prompts)
            usage = Usage(prompt_tokens=count, completion_tokens=0, total_tokens=count)
            return _whole(service, body, echoes, pieces, usage, loaded.version)
        replies = Replies.start(service, prompts, body, logprobs=body.logprobs, loaded=loaded)
        if body.stream:
            return EventStream(replies, _events(replies, service, body, echoes, first_piece))

        async def answer() -> Response:
            pieces = await replies.collect()
            first_piece()
            return _whole(service, body, echoes, pieces, replies.usage, replies.version)

        return await unless_gone(request, replies, answer())


def _read_prompts(service: Service, body: CompletionRequest, new_tokens: int) -> list[_Raw]:
    """The prompts as ids. Raises :class:`APIError` for a prompt that is empty, too long or contains unknown ids."""
    if not new_tokens and (not body.echo or body.stream):
        raise APIError(400, "max_tokens: expected at least 1, or 0 with echo and without stream", param="max_tokens")
    tokenizer, max_length = service.engine.tokenizer, service.model.max_length
    opening = tokenizer.render_prompt(Conversation(())).ids
    raws = []
    for prompt in body.prompts:
        try:
            ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        except UserError as error:
            raise APIError(400, str(error), param="prompt") from error
        if any(not 0 <= token < tokenizer.vocab_size for token in ids):
            raise APIError(400, f"prompt: expected token ids from 0 to {tokenizer.vocab_size - 1}", param="prompt")
        before = [] if ids and ids[0] in tokenizer.special_ids else opening
        if len(before + ids) + new_tokens > max_length:
            raise APIError(
                400,
                f"prompt: {len(ids)} tokens do not fit into the model's context of {max_length} tokens",
                param="prompt",
                code="context_length_exceeded",
            )
        raws.append(_Raw(prompt if isinstance(prompt, str) else tokenizer.decode(ids), ids, before))
    return raws


async def _echoes(
    service: Service, body: CompletionRequest, raws: Sequence[_Raw], loaded: Loaded
) -> list[CompletionChoice]:
    """The prompts as the beginning of their responses: text, and log-probs if asked for. Empty without echo."""
    echoes = []
    for raw in raws:
        logprobs = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        if body.echo and body.logprobs is not None:
            logprobs = await _score(service, raw, body.logprobs, loaded)
        echoes.append(CompletionChoice(index=0, text=raw.text if body.echo else "", logprobs=logprobs))
    return echoes


async def _score(service: Service, raw: _Raw, top: int, loaded: Loaded) -> CompletionLogprobs:
    """The log-probs of the tokens of a prompt."""
    engine, ids = service.engine, [*raw.before, *raw.ids]
    try:
        found = await asyncio.wrap_future(engine.run(lambda: prompt_logprobs(loaded.bundle.model, ids, top)))
    except EngineFullError as error:
        raise engine_full(error) from error
    scored = _logprobs(engine.tokenizer, found, 0)
    if not raw.before:
        scored.tokens.insert(0, token_text(engine.tokenizer, ids[0]))
        scored.token_logprobs.insert(0, None)
        scored.top_logprobs.insert(0, None)
        scored.text_offset.insert(0, 0)
    return scored


def _logprobs(tokenizer: ChatTokenizer, found: Sequence[TokenLogprob], offset: int) -> CompletionLogprobs:
    """In OpenAI's format, for tokens whose text begins at ``offset``."""
    decoder = tokenizer.stream()
    lengths = [len(decoder.push(one.token)) for one in found]
    return CompletionLogprobs(
        tokens=[token_text(tokenizer, one.token) for one in found],
        token_logprobs=[one.logprob for one in found],
        top_logprobs=[
            {token_text(tokenizer, token): logprob for token, logprob in (*one.top, (one.token, one.logprob))}
            for one in found
        ],
        text_offset=list(itertools.accumulate(lengths, initial=offset))[: len(found)],
    )


def _joined(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    return CompletionLogprobs(
        tokens=first.tokens + second.tokens,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        top_logprobs=first.top_logprobs + second.top_logprobs,
        text_offset=first.text_offset + second.text_offset,
    )


def _whole(
    service: Service,
    body: CompletionRequest,
    echoes: Sequence[CompletionChoice],
    pieces: Sequence[Piece],
    usage: Usage,
    version: str,
) -> Response:
    """All responses in one body."""
    choices = []
    for index, piece in enumerate(pieces):
        echo = echoes[index // (body.n or 1)]
        assert echo.logprobs is not None
        generated = _logprobs(service.engine.tokenizer, piece.logprobs, len(echo.text))
        choices.append(
            CompletionChoice(
                index=index,
                text=echo.text + piece.text,
                finish_reason=finish_reason(piece.finish),
                logprobs=None if body.logprobs is None else _joined(echo.logprobs, generated),
            )
        )
    completion = Completion(model=service.model.id, choices=choices, usage=usage, system_fingerprint=version)
    return json_response(completion, version)


async def _events(
    replies: Replies,
    service: Service,
    body: CompletionRequest,
    echoes: Sequence[CompletionChoice],
    first_piece: Callable[[], None],
) -> AsyncIterator[str]:
    """The responses as server-sent events: JSON chunks, then ``[DONE]``."""
    stamp: dict[str, Any] = {
        "id": new_id("cmpl-"),
        "created": now(),
        "model": service.model.id,
        "system_fingerprint": replies.version,
    }

    def event(*choices: CompletionChoice, usage: Usage | None = None) -> str:
        chunk = Completion(**stamp, choices=list(choices), usage=usage)
        return f"data: {chunk.model_dump_json(exclude={'usage'} if usage is None else None)}\n\n"

    lengths = [len(echoes[index // (body.n or 1)].text) for index in range(len(replies))]
    if body.echo:
        for index in range(len(replies)):
            echo = echoes[index // (body.n or 1)]
            yield event(
                echo.model_copy(update={"index": index, "logprobs": None if body.logprobs is None else echo.logprobs})
            )
    try:
        async for index, piece in replies:
            first_piece()
            logprobs = None
            if body.logprobs is not None:
                logprobs = _logprobs(service.engine.tokenizer, piece.logprobs, lengths[index])
            lengths[index] += len(piece.text)
            reason = None if piece.finish is None else finish_reason(piece.finish)
            yield event(CompletionChoice(index=index, text=piece.text, finish_reason=reason, logprobs=logprobs))
    except APIError as error:  # the status was already sent
        yield f"data: {json.dumps(error.body)}\n\n"
        return
    if body.wants_usage:
        yield event(usage=replies.usage)
    yield "data: [DONE]\n\n"
