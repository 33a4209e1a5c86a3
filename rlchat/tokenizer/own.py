"""A base model's own tokenizer and chat format, from its files."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import replace

from rlchat.conversation import Conversation, Message
from rlchat.tokenizer.base_files import TokenizerFiles
from rlchat.tokenizer.chat_format import ChatFormat
from rlchat.tokenizer.chat_template import read_template
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer
from rlchat.tokenizer.convert import Conversion, convert
from rlchat.tokenizer.pattern import NotExact
from rlchat.tokenizer.text_encoding import TextEncoding

log = logging.getLogger("rlchat")

_NEW_PAD = "<|rlchat_pad|>"
# The white space that a control token with lstrip or rstrip takes: that of Unicode, without str.isspace's separators.
_SPACE = "".join(letter for letter in map(chr, range(0x3001)) if letter.isspace() and letter not in "\x1c\x1d\x1e\x1f")
_TOKEN_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
_OTHER_ENCODING = (
    "Set --model.tiktoken_encoding cl100k_base (or another encoding): rows of the embedding then start from the pieces "
    "that the base tokenizer makes of each token, and the model has to be trained for longer"
)
_OTHER_FORMAT = "Set --model.chat_format rlchat to use rlchat's own markers"


def own_encoding(files: TokenizerFiles, cure: str = _OTHER_ENCODING) -> Conversion:
    """The tokenizer of ``files`` under tiktoken.

    Raises :class:`NotExact` with the reason where that is not exact, and ``cure``, which says what to do instead.
    """
    try:
        return convert(files.tokenizer, _short_name(files.source))
    except NotExact as error:
        raise NotExact(
            f"{files.source}: its tokenizer cannot be converted to tiktoken exactly: {error}. {cure}"
        ) from error


def own_format_of(
    files: TokenizerFiles, conversion: Conversion, cure: str = _OTHER_FORMAT
) -> tuple[TextEncoding, ChatFormat | None]:
    """The encoding of ``conversion`` with a token for padding, and the chat format; None without a chat template.

    Raises :class:`NotExact` for a template that no table can replace, with ``cure``, which says what to do instead.
    """
    encoding = conversion.encoding
    if not files.template:
        return encoding, None
    tokens = {name: files.token(name) for name in _TOKEN_NAMES}
    try:
        read = read_template(files.template, encoding.special_tokens, tokens, encoding.name)
        encoding, form = _with_pad(encoding, _without_space(read, files), tokens["pad_token"])
        _check_ids(files, conversion, ChatTokenizer.of(encoding, form), read)
    except NotExact as error:
        raise NotExact(f"{files.source}: {error}. {cure}") from error
    plain = [role for role, text in form.before.items() if text and not any(t in text for t in encoding.special_tokens)]
    if plain:
        log.warning(
            "the chat template of %s marks %s messages by ordinary text, which a user can type too",
            encoding.name,
            " and ".join(plain),
        )
    return encoding, form


def _with_pad(encoding: TextEncoding, form: ChatFormat, own: str) -> tuple[TextEncoding, ChatFormat]:
    """Padding needs an id that no response contains: not the end token, which is the pad token of many models."""
    written = "".join((form.start, form.start_system, form.opening, *form.before.values(), *form.after.values()))
    special = encoding.special_tokens
    likely = [own, *(name for name in special if "pad" in name.lower()), *special]
    for name in likely:
        if name in special and name not in written:
            return encoding, replace(form, pad=name)
    special = {**special, _NEW_PAD: encoding.size}
    return replace(encoding, special_tokens=special), replace(form, pad=_NEW_PAD)


def _without_space(form: ChatFormat, files: TokenizerFiles) -> ChatFormat:
    """``form`` with the white space that the base tokenizer drops between its control tokens and a text (Phi-4)."""
    after, before = _greedy(files, "rstrip"), _greedy(files, "lstrip")
    start, end = dict(form.strip_start), dict(form.strip_end)
    for role in form.before.keys() - set(form.strips):  # strips removes more than tokenizers does
        # After a thought that the format writes, a response does not touch the control token.
        if form.before[role].endswith(after) and set(start.get(role, "")) <= set(_SPACE):
            start[role] = _SPACE
        if form.tail(role).startswith(before) and set(end.get(role, "")) <= set(_SPACE):
            end[role] = _SPACE
    return replace(form, strip_start=start, strip_end=end)


def _greedy(files: TokenizerFiles, side: str) -> tuple[str, ...]:
    """The control tokens that take the white space on one side of them."""
    return tuple(
        str(token["content"])
        for token in files.tokenizer.get("added_tokens", ())
        if token.get("special", True) and token.get(side)
    )


def _check_ids(files: TokenizerFiles, conversion: Conversion, ours: ChatTokenizer, read: ChatFormat) -> None:
    """Raises :class:`NotExact` where a prompt, as the template writes it, gets other ids than from the base tokenizer.

    ``read`` is the format as it was read off the template.
    """
    from tokenizers import Tokenizer

    theirs = Tokenizer.from_str(json.dumps(files.tokenizer))
    theirs.no_truncation()
    theirs.no_padding()
    texts = ("Hello", " a", "b ", "\n\nlines\n", "12 x", "'s", "\u00e9\U0001f642", "")
    chains = [[Message("user", text)] for text in texts]
    if "system" in read.before:
        chains += [[Message("system", text), Message("user", text)] for text in texts]
    if not read.single_turn:  # the text of a response is encoded by itself, as it was sampled
        chains += [[Message("user", text), Message("assistant", ""), Message("user", text)] for text in texts]
    for messages in chains:
        encoded = theirs.encode(read.text(messages, opening=True), add_special_tokens=False).ids
        expected = [conversion.moved.get(token, token) for token in encoded]
        if (ids := ours.render_prompt(Conversation(tuple(messages))).ids) != expected:
            said = ", ".join(f"{message.role} {message.text!r}" for message in messages)
            same = [one == other for one, other in zip(ids, expected, strict=False)]
            place = same.index(False) if False in same else len(same)
            raise NotExact(
                f"on ({said}) its tokenizer makes {_names(ours, expected[place : place + 5])} of what the template "
                f"writes, where rlchat has {_names(ours, ids[place : place + 5])}"
            )


def _names(tokenizer: ChatTokenizer, ids: Sequence[int]) -> str:
    special = tokenizer.special_tokens()
    return repr([special.get(token) or tokenizer.decode([token]) for token in ids])


def _short_name(source: str) -> str:
    return re.sub(r"[^\w.\-]+", "_", source.rstrip("/").split("/")[-1]) or "own"
