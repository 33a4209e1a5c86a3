"""ChatTokenizer: a tiktoken encoding with chat markers.

A conversation is rendered as ``<|user|>Hello<|end|><|assistant|>Hi there.<|end|>``. The markers are special tokens
that follow the encoding's own ids, and text is always encoded with ``encode_ordinary``: a typed ``<|assistant|>``
becomes ordinary text tokens, never the marker.

    tokenizer = ChatTokenizer("rlchat_1k")
    tokenizer.decode(tokenizer.encode("Hello"))
"""

from __future__ import annotations

import base64
import binascii
import codecs
import functools
import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import tiktoken

from rlchat.conversation import Conversation, Message
from rlchat.errors import UserError

MARKERS = ("<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

# How text is split before byte pairs are merged inside each piece: words with the space or punctuation mark before
# them, runs of up to three digits, punctuation, line ends. It is the pattern of cl100k_base, used by most rank files.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
# The same for training, except that digits stay single so that a small vocabulary is not used up by numbers. A rank
# file without tokens of several digits encodes digits singly under PATTERN too, so PATTERN works for both.
_TRAINING_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+$|\s*[\r\n]|\s+(?!\S)|\s"
)


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as token ids.

    ``loss_mask[t]`` is True where ``ids[t]`` belongs to an assistant message to be learned, its end marker included.
    ``dropped`` counts the messages left out on the left, ``cut`` the tokens removed from a message that alone was too
    long. ``response_cut`` is True for a response that was cut and closed, see :meth:`ChatTokenizer.render_response`.
    """

    ids: list[int]
    loss_mask: list[bool]
    dropped: int = 0
    cut: int = 0
    response_cut: bool = False


class ChatTokenizer:
    """Text to ids and back, over any tiktoken encoding.

    ``encoding`` is a name that tiktoken knows (``cl100k_base``), a packaged name (``rlchat_1k``, works with no network)
    or the path of a rank file (``*.tiktoken``). Raises :class:`UserError` for an unknown name, a damaged rank file, or
    an encoding that cannot be downloaded.
    """

    def __init__(self, encoding: str = "rlchat_1k") -> None:
        self._build(_load_encoding(encoding))

    def _build(self, base: tiktoken.Encoding) -> None:
        first = base.n_vocab
        specials = {**base._special_tokens, **{marker: first + i for i, marker in enumerate(MARKERS)}}
        self.name = base.name
        self._encoding = tiktoken.Encoding(
            f"{base.name}+chat",
            pat_str=base._pat_str,
            mergeable_ranks=base._mergeable_ranks,
            special_tokens=specials,
        )
        self._base_specials = dict(base._special_tokens)
        self._marker = {marker: first + i for i, marker in enumerate(MARKERS)}
        # Not specials.values(): o200k_harmony has its own <|end|>, whose id is no longer in that dict.
        self._silent = frozenset([*base._special_tokens.values(), *self._marker.values()])
        self.vocab_size = first + len(MARKERS)
        self.pad_id = self._marker["<|pad|>"]
        self.end_id = self._marker["<|end|>"]
        self._fingerprint: str | None = None

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> ChatTokenizer:
        """The tokenizer that :meth:`state` described, without any file or network."""
        tokenizer = cls.__new__(cls)
        tokenizer._build(
            tiktoken.Encoding(
                state["name"],
                pat_str=state["pattern"],
                mergeable_ranks=parse_ranks(state["ranks"], state["name"]),
                special_tokens=dict(state["special_tokens"]),
            )
        )
        return tokenizer

    def state(self) -> dict[str, Any]:
        """Plain values from which :meth:`from_state` builds the same tokenizer anywhere (``ranks`` is bytes)."""
        return {
            "name": self.name,
            "pattern": self._encoding._pat_str,
            "ranks": format_ranks(self._encoding._mergeable_ranks),
            "special_tokens": self._base_specials,
        }

    @property
    def fingerprint(self) -> str:
        """A hash of ranks, pattern and markers: equal for tokenizers that produce equal ids."""
        if self._fingerprint is None:
            digest = hashlib.sha256(format_ranks(self._encoding._mergeable_ranks))
            digest.update(repr((self._encoding._pat_str, sorted(self._base_specials.items()), MARKERS)).encode())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids that stand for no text: the chat markers and the encoding's own special tokens."""
        return self._silent

    @property
    def base_size(self) -> int:
        """The number of ids of the encoding itself; the chat markers follow them."""
        return self.vocab_size - len(MARKERS)

    def base_vocabulary(self) -> dict[int, bytes]:
        """The bytes of each id of the encoding itself; its special tokens as they are spelled, unused ids left out."""
        specials = {token: text.encode() for text, token in self._base_specials.items()}
        return {**{token: text for text, token in self._encoding._mergeable_ranks.items()}, **specials}

    @property
    def unsayable_ids(self) -> list[int]:
        """The ids that a response cannot contain: all without text, except the end marker."""
        allowed = set(self._encoding._mergeable_ranks.values()) | {self.end_id}
        return [token for token in range(self.vocab_size) if token not in allowed]

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; never a special token, even where the text spells one.

        Raises :class:`UserError` for text that tiktoken cannot encode, such as a run of a million spaces.
        """
        try:
            return self._encoding.encode_ordinary(text)
        except BaseException as error:
            # tiktoken's Rust code panics where its pattern needs too much stack. The class of that error cannot be
            # imported, and it is no Exception.
            if type(error).__name__ != "PanicException":
                raise
            raise UserError(
                f"the tokenizer cannot encode a text of {len(text):,} characters; shorten it, or remove long runs of "
                f"spaces or of other repeated characters"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; special and unused ids are left out, invalid UTF-8 becomes U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes that ``token`` stands for; empty for special ids and for ids that the encoding leaves unused."""
        if token in self._silent:
            return b""
        try:
            return self._encoding.decode_single_token_bytes(token)
        except KeyError:  # cl100k_base and others have unused ids, and an untrained model samples them
            return b""

    def stream(self) -> StreamDecoder:
        """An incremental decoder for one reply."""
        return StreamDecoder(self)

    def render(self, conversation: Conversation, max_length: int | None = None) -> Rendered:
        """The whole conversation, as it is trained on. See :meth:`render_prompt` for the truncation."""
        return self._fit(conversation, max_length, opening=[])

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
        """The conversation and the marker that opens the assistant's turn.

        A conversation longer than ``max_length`` loses whole messages, oldest first; a leading system message is kept
        while it fits. Where the last turn alone is too long, its question loses tokens from the left and then its reply
        from the right, including its end marker. Raises ValueError where not even the marker of the reply fits.
        """
        return self._fit(conversation, max_length, opening=[self._marker["<|assistant|>"]])

    def _fit(self, conversation: Conversation, max_length: int | None, opening: list[int]) -> Rendered:
        segments = [
            _Segment(m.role, [self._marker[f"<|{m.role}|>"], *self.encode(m.text), self.end_id], m.learn)
            for m in conversation.messages
        ]
        dropped = cut = 0
        if max_length is not None and max_length < len(opening):
            raise ValueError(f"max_length is {max_length}, which leaves no room for the marker of the reply")
        if max_length is not None and _count(segments) > (room := max_length - len(opening)):
            kept = _keep_from_the_right(segments, room)
            fitted = _cut_to(kept, room) if _count(kept) > room else kept
            dropped, cut = len(segments) - len(kept), _count(kept) - _count(fitted)
            segments = fitted
        ids: list[int] = []
        mask: list[bool] = []
        for segment in segments:
            ids += segment.ids
            # The marker that opens a turn is part of the prompt.
            mask += ([False] + [segment.role == "assistant" and segment.learn] * len(segment.ids))[: len(segment.ids)]
        return Rendered(ids + opening, mask + [False] * len(opening), dropped, cut)


@dataclass(frozen=True, slots=True)
class _Segment:
    """One message as ids: its marker, its text, the end marker."""

    role: str
    ids: list[int]
    learn: bool = True  # whether the loss covers it, if the assistant speaks

    def cut_left(self, room: int) -> _Segment:
        if len(self.ids) <= room:
            return self
        return _Segment(self.role, [self.ids[0], *self.ids[len(self.ids) - room + 1 :]][:room], self.learn)

    def cut_right(self, room: int) -> _Segment:
        return _Segment(self.role, self.ids[:room], self.learn)


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


def packaged_encodings() -> list[str]:
    """Names of the encodings that are installed with rlchat."""
    return sorted(p.name.removesuffix(".tiktoken") for p in _packaged().iterdir() if p.name.endswith(".tiktoken"))


def train_ranks(texts: Iterator[str], vocab_size: int, *, progress: bool = False) -> dict[bytes, int]:
    """Byte-pair ranks learned from ``texts``: ``vocab_size`` tokens including the 256 single bytes.

    Raises ValueError for fewer than 256 tokens. Returns fewer than requested where the texts have no more pairs.
    """
    if vocab_size < 256:
        raise ValueError(f"a vocabulary of {vocab_size} tokens cannot hold the 256 single bytes")
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_TRAINING_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=progress,
    )
    bpe.train_from_iterator(texts, trainer)
    by_id = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    return {from_byte_letters(token): rank for rank, (token, _) in enumerate(by_id)}


def from_byte_letters(token: str) -> bytes:
    """The bytes of ``token`` as byte-level vocabularies spell it: ``Ġa`` is a space and an ``a``.

    Raises KeyError for a letter outside of GPT-2's byte-level alphabet.
    """
    byte_of = _letter_bytes()
    return bytes(byte_of[letter] for letter in token)


def format_ranks(ranks: dict[bytes, int]) -> bytes:
    """The ``.tiktoken`` text of ``ranks``: one line per token, its bytes in base64 and its rank."""
    lines = (b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in sorted(ranks.items(), key=lambda r: r[1]))
    return b"".join(lines)


def parse_ranks(text: bytes, source: str) -> dict[bytes, int]:
    """Ranks from ``.tiktoken`` text. Raises :class:`UserError` naming ``source`` and the invalid line."""
    # Not read with tiktoken's own loader, which caches by path: it would return the old content of a rank file that
    # was trained again.
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            if not 0 <= int(rank) < 2**31:
                raise ValueError(f"a rank of {int(rank)}")
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise UserError(
                f"{source}:{number}: not a line of a tiktoken rank file (base64 of the token, a space, its rank)"
            ) from error
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise UserError(f"{source}: {len(missing)} of the 256 single bytes have no rank; this is not a whole rank file")
    if len(set(ranks.values())) != len(ranks):
        raise UserError(f"{source}: some ranks are given twice; this is not a sound rank file")
    return ranks


def _load_encoding(encoding: str) -> tiktoken.Encoding:
    if encoding in packaged_encodings():
        text = _packaged().joinpath(f"{encoding}.tiktoken").read_bytes()
        return _from_ranks(encoding, text, encoding)
    if encoding in tiktoken.list_encoding_names():
        return _get_named(encoding)
    path = Path(encoding).expanduser()
    if path.is_file():
        return _from_ranks(path.stem, path.read_bytes(), encoding)
    if path.suffix == ".tiktoken" or os.sep in encoding:
        raise UserError(f"{encoding}: no such rank file; give its path, or make one with `rlchat tokenizer train`")
    known = [*packaged_encodings(), *tiktoken.list_encoding_names()]
    raise UserError(f"unknown encoding {encoding!r}; choose one of {', '.join(known)}, or give the path of a rank file")


def _from_ranks(name: str, text: bytes, source: str) -> tiktoken.Encoding:
    return tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=parse_ranks(text, source), special_tokens={})


def _get_named(name: str) -> tiktoken.Encoding:
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # requests, urllib3, OS errors and tiktoken's own hash check, by version
        raise UserError(
            f"the encoding {name} is not on this machine and could not be fetched ({type(error).__name__}); connect "
            f"once, set TIKTOKEN_CACHE_DIR to a folder that holds it, or use the packaged {packaged_encodings()[0]}"
        ) from error


def _packaged() -> Any:
    return resources.files("rlchat.tokenizer") / "encodings"


def _keep_from_the_right(segments: list[_Segment], room: int) -> list[_Segment]:
    """The last messages that fit, from a user's turn on; at least the last turn (a reply keeps what it replies to)."""
    last_turn = len(segments) - 1
    if segments[last_turn].role == "assistant" and last_turn > 0:
        last_turn -= 1
    pinned = segments[:1] if segments[0].role == "system" and last_turn > 0 else []
    if _count(pinned) + _count(segments[last_turn:]) > room:
        pinned = []
    used = _count(pinned) + _count(segments[last_turn:])
    start = last_turn
    for index in range(last_turn - 1, len(pinned) - 1, -1):
        used += len(segments[index].ids)
        if used > room:
            break
        if segments[index].role == "user":
            start = index
    return pinned + segments[start:]


def _cut_to(segments: list[_Segment], room: int) -> list[_Segment]:
    """A last turn that alone is too long, cut: the question from the left, down to half of the room, then the reply."""
    if len(segments) == 1:
        (only,) = segments
        return [only.cut_right(room) if only.role == "assistant" else only.cut_left(room)]
    question, reply = segments
    question = question.cut_left(max(room // 2, room - len(reply.ids)))
    return [question, reply.cut_right(room - len(question.ids))]


def _count(segments: list[_Segment]) -> int:
    return sum(len(segment.ids) for segment in segments)


@functools.cache
def _letter_bytes() -> dict[str, int]:
    """GPT-2's byte-level alphabet: the byte of each letter. Printable bytes are their own letters, others follow."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {**{chr(byte): byte for byte in printable}, **{chr(0x100 + i): byte for i, byte in enumerate(rest)}}
