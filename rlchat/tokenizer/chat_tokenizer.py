"""ChatTokenizer: a tiktoken encoding with a chat format.

With rlchat's own markers a conversation is ``<|user|>Hello<|end|><|assistant|>Hi there.<|end|>``; a base model keeps
the format that it was trained with. Text is always encoded as text: a typed ``<|assistant|>`` becomes ordinary tokens,
never the control token.

    tokenizer = ChatTokenizer("rlchat_1k")
    tokenizer.decode(tokenizer.encode("Hello"))
"""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from rlchat.conversation import Conversation, Message
from rlchat.tokenizer.chat_format import MARKERS, ChatFormat, rlchat_format
from rlchat.tokenizer.load import load_encoding
from rlchat.tokenizer.rendering import Rendered, Renderer
from rlchat.tokenizer.text_encoding import TextEncoding


class ChatTokenizer:
    """Text to ids and back, over any tiktoken encoding.

    ``encoding`` is a name that tiktoken knows (``cl100k_base``), a packaged name (``rlchat_1k``, needs no network), the
    path of a rank file (``*.tiktoken``), or a folder or model name with a ``tokenizer.json`` that can be converted
    exactly. The chat format is the one that comes with the encoding; with ``own_format`` False, or if it has none, it
    is rlchat's own, whose markers are special tokens after the encoding's ids. Raises :class:`UserError` for an unknown
    name, a damaged rank file, an encoding that cannot be downloaded, or a tokenizer or chat template that cannot be
    reproduced exactly.
    """

    def __init__(self, encoding: str = "rlchat_1k", own_format: bool = True) -> None:
        text, form = load_encoding(encoding, own_format)
        self._build(text, form)

    @classmethod
    def of(cls, encoding: TextEncoding, form: ChatFormat | None = None) -> ChatTokenizer:
        """The tokenizer over ``encoding`` with the chat format ``form``, whose special tokens are the encoding's.

        With None, rlchat's own markers follow the ids of the encoding.
        """
        tokenizer = cls.__new__(cls)
        tokenizer._build(encoding, form)
        return tokenizer

    def _build(self, encoding: TextEncoding, form: ChatFormat | None) -> None:
        self.name, self.encoding = encoding.name, encoding
        self.has_own_format = form is not None
        self.format = form or rlchat_format()
        if form is None:
            self._controls = {marker: encoding.size + number for number, marker in enumerate(MARKERS)}
        else:
            self._controls = encoding.special_tokens
        self._silent = frozenset([*encoding.special_tokens.values(), *self._controls.values()])
        self.vocab_size = encoding.size if self.has_own_format else encoding.size + len(MARKERS)
        self.pad_id, self.end_id = self._controls[self.format.pad], self._controls[self.format.end]
        self._renderer = Renderer(self.format, encoding.encode, self._controls)
        self._fingerprint: str | None = None

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> ChatTokenizer:
        """The tokenizer that :meth:`state` described, without any file or network."""
        form = state.get("chat_format")
        return cls.of(TextEncoding.from_state(state), None if form is None else ChatFormat.from_state(form))

    def state(self) -> dict[str, Any]:
        """Plain values from which :meth:`from_state` builds the same tokenizer anywhere (``ranks`` is bytes)."""
        form = {"chat_format": self.format.state()} if self.has_own_format else {}
        return {**self.encoding.state(), **form}

    @property
    def fingerprint(self) -> str:
        """A hash of ranks, pattern and chat format: equal for tokenizers that produce equal ids."""
        if self._fingerprint is None:
            state = self.state()
            del state["name"]
            ranks, specials = state.pop("ranks"), sorted(state.pop("special_tokens").items())
            digest = hashlib.sha256(ranks)
            digest.update(repr((state.pop("pattern"), specials, MARKERS)).encode())
            if state:
                digest.update(repr(sorted(state.items())).encode())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids that stand for no text: the chat markers and the encoding's own special tokens."""
        return self._silent

    @property
    def base_size(self) -> int:
        """The number of ids of the encoding itself; rlchat's markers, where they are used, follow them."""
        return self.encoding.size

    def special_tokens(self) -> dict[int, str]:
        """The name of each special id."""
        return {token: name for name, token in (*self.encoding.special_tokens.items(), *self._controls.items())}

    def control_ids(self, text: str) -> list[int]:
        """Ids of ``text``, which is part of the chat format: names of special tokens in it are these tokens."""
        return list(self._renderer.written(text))

    @property
    def unsayable_ids(self) -> list[int]:
        """The ids that a response cannot contain: all without text, except the end marker."""
        allowed = (self.encoding.tokens.keys() - set(self.encoding.unused)) | {self.end_id}
        return [token for token in range(self.vocab_size) if token not in allowed]

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; never a special token, even where the text spells one.

        Raises :class:`UserError` for text that tiktoken cannot encode, such as a run of a million spaces.
        """
        return self.encoding.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; special and unused ids are left out, invalid UTF-8 becomes U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes that ``token`` stands for; empty for special ids and for ids that the encoding leaves unused."""
        # cl100k_base and others have unused ids, and an untrained model samples them
        return b"" if token in self._silent else self.encoding.tokens.get(token, b"")

    def token_name(self, token: int) -> str:
        """A name for an id without text; different ids have different names."""
        names = {number: name for name, number in self._controls.items()}
        return names.get(token, f"<|{token}|>")

    def stream(self) -> StreamDecoder:
        """An incremental decoder for one reply."""
        return StreamDecoder(self)

    def render(self, conversation: Conversation, max_length: int | None = None) -> Rendered:
        """The whole conversation, as it is trained on. See :meth:`render_prompt` for the truncation."""
        return self._renderer.render(conversation.messages, max_length, opening=False)

    def render_response(self, prompt: Conversation, response: Message, max_length: int | None = None) -> Rendered:
        """``prompt`` and ``response`` as a reward model sees them: always closed with the end marker.

        Where ``max_length`` cuts the response, the end marker replaces the last token that is left of it. So a response
        from the data that was cut looks like a generated one that was cut at ``max_new_tokens``.
        """
        rendered = self.render(prompt.with_reply(response), max_length)
        if not rendered.ids or rendered.ids[-1] == self.end_id:
            return rendered
        return replace(rendered, ids=[*rendered.ids[:-1], self.end_id], response_cut=True)

    def render_prompt(self, conversation: Conversation, max_length: int | None = None) -> Rendered:
        """The conversation and what asks for the assistant's response.

        A conversation longer than ``max_length`` loses whole messages, oldest first; a leading system message is kept
        while it fits. Where the last turn alone is too long, its question loses tokens from the left and then its reply
        from the right, including its end marker. Raises ValueError where not even the marker of the reply fits, and
        :class:`UserError` for a conversation that the chat format of a base model cannot express.
        """
        return self._renderer.render(conversation.messages, max_length, opening=True)

    def render_turn(self, messages: Sequence[Message], ended: bool) -> list[int]:
        """The ids that follow a response: ``messages``, then what asks for the next response.

        Unless the response ``ended`` by itself, its end marker comes first.
        """
        return self._renderer.following(messages, ended)


class StreamDecoder:
    """Decodes one response token by token, never splitting a character."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that ``token`` completed; empty while a character is incomplete."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        """The rest at the end: empty, or U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", final=True)
